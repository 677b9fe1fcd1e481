"""The slow, obvious way: per-example gradients by torch.func, in float64. What the fast path is tested against."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from gradtrace.gradients import Measure, measure_at
from gradtrace.task import Batch, Example, Task

_ATTENTION_SETTING = Lock()


@contextmanager
def attention_by_matrices() -> Iterator[None]:
    """While open, attention is computed by operations that torch.func can transform: flash attention has no batching
    rule. Which kernels may be used is a setting of the process, not of a thread."""
    with _ATTENTION_SETTING, sdpa_kernel(SDPBackend.MATH):
        yield


class Measured(nn.Module):
    """`measure` as a module's forward, so that functional_call can swap the parameters in it."""

    def __init__(self, model: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model = model
        self.measure = measure

    def forward(self, batch: Batch) -> Tensor:
        return self.measure(self.model, batch)


def vmapped_gradients(model: nn.Module, measure: Measure, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Per-example gradients of the named parameters by vmap(grad). Each [batch, *parameter.shape]."""
    parameters = {f"model.{name}": model.get_parameter(name).detach() for name in names}
    count = next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    positions = torch.arange(count, device=next(iter(parameters.values())).device)

    def one(parameters: dict[str, Tensor], example: Batch, position: Tensor) -> Tensor:
        alone = tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, example)
        measured = Measured(model, measure_at(measure, position[None]))
        losses: Tensor = functional_call(measured, parameters, (alone,))
        return losses.sum()

    with attention_by_matrices():
        gradients = vmap(grad(one), in_dims=(None, 0, 0), randomness="error")(parameters, batch, positions)
    return {name.removeprefix("model."): value for name, value in gradients.items()}


def gradients_reference(
    task: Task, model: nn.Module, examples: Sequence[Example], measure: Measure | None = None
) -> dict[str, Tensor]:
    """Exact per-example gradients of every trainable parameter.

    Args:
        model: with the weights to differentiate at; left unchanged.
        examples: items of the data set, each with a label.
        measure: default `task.loss`.

    Returns:
        Parameter name -> float64 [len(examples), *parameter.shape].
    """
    exact = copy.deepcopy(model).double().eval()
    names = [name for name, parameter in exact.named_parameters() if parameter.requires_grad]
    return vmapped_gradients(exact, measure or task.loss, in_double(task.collate(list(examples))), names)


def in_double(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
