"""The last hidden representation of an example: what the model's last fully connected layer is given for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.data.batches import values_of
from gradtrace.errors import TaskError
from gradtrace.gradients.capture import first_argument
from gradtrace.task import Batch, Task

TASK_HOOK = "Task.representation"

Uses = list[tuple[nn.Module, Tensor]]


@dataclass(frozen=True, slots=True)
class Representation:
    """Where a model's last hidden representations come from. source: the layer whose input they are, or TASK_HOOK"""

    source: str
    dimensions: int


def find_representation(task: Task, model: nn.Module, batches: Sequence[Batch]) -> Representation | None:
    """What the task defines; else the input of the last Linear layer in a forward pass. None where that layer is used
    more than once, or not on one vector for each example of all batches, or there is none.

    batches: of different sizes, since positions may be as many as examples by chance.

    Raises:
        TaskError: task.representation gives something else than [batch, features].
    """
    by_batch = {_representation(task, model, batch) for batch in batches}
    return by_batch.pop() if len(by_batch) == 1 else None


def _representation(task: Task, model: nn.Module, batch: Batch) -> Representation | None:
    with recorded_inputs(m for m in model.modules() if isinstance(m, nn.Linear)) as uses:
        count = len(values_of(task.loss, model, batch))
    if task.has_representation:
        return Representation(TASK_HOOK, _given(task, model, batch, count).shape[1])
    if not uses:
        return None
    layer, x = uses[-1]
    if x.shape[:-1] != (count,) or [module for module, _ in uses].count(layer) > 1:
        return None
    source = next(name for name, module in model.named_modules() if module is layer)
    return Representation(source, x.shape[1])


def _given(task: Task, model: nn.Module, batch: Batch, count: int) -> Tensor:
    with torch.no_grad():
        given = task.representation(model, batch)
    if given.dim() != 2 or len(given) != count or not given.is_floating_point():
        raise TaskError(
            f"{type(task).__name__}.representation gives {list(given.shape)} values of {given.dtype} for {count} "
            "examples: return one vector for each, [batch, features], in floating point"
        )
    return given


@contextmanager
def recorded_inputs(layers: Iterable[nn.Module]) -> Iterator[Uses]:
    """While open, the list grows by (layer, its input) with every use of these layers."""
    uses: Uses = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        uses.append((module, first_argument(args, kwargs).detach()))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield uses
