"""A task with a model of its own: what is computed with them, before anything is known of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gradtrace.data.batches import ExampleBatch, Measure, collate
from gradtrace.errors import UnsupportedLayerError
from gradtrace.gradients.plan import trainable_names
from gradtrace.task import Batch, Example, Task

MeasureName = Literal["loss", "measurement", "prediction"]  # the last: the negative predicted value


class TaskModel:
    """
    Attributes:
        task: whose functions are called.
        model: a copy of the task's.
        device: where the model is, and batches go.
        trainable: names of the parameters that count.
    """

    def __init__(self, task: Task, device: torch.device, probe: Sequence[Example]) -> None:
        """probe: examples to take the sizes of lazy modules from."""
        self.task, self.device = task, device
        self.model = fresh_model(task, probe)
        self.trainable = trainable_names(self.model, task.layers)

    def batch(self, examples: Sequence[Example]) -> ExampleBatch:
        """Collated and on the device."""
        return collate(self.task, examples, self.device)

    def collated(self, examples: Sequence[Example]) -> Batch:
        """What the task's functions take, on the device."""
        return self.batch(examples).collated

    def measure(self, name: MeasureName) -> Measure:
        """What is explained of a query, by this model's own copy of the task."""
        measures: dict[MeasureName, Measure] = {"loss": self.task.loss, "measurement": self.task.measurement}
        return measures.get(name, self._negative_prediction)

    def _negative_prediction(self, model: nn.Module, batch: Batch) -> Tensor:
        return -self.task.predict(model, batch).flatten()


def private_copy(task: Task) -> Task:
    """A task that shares no attribute that it may set or fill with the original: what a loss keeps there for later
    would be overwritten by another thread. Data sets, tensors and modules are shared, since they may be large."""
    memo = {id(value): value for value in _shared(vars(task))}
    try:
        return copy.deepcopy(task, memo)
    except Exception:  # it holds something that cannot be copied, such as an open file
        return copy.copy(task)


def _shared(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        is_data = hasattr(leaf, "__getitem__") and hasattr(leaf, "__len__")  # arrays, tables, data sets
        if isinstance(leaf, Tensor | nn.Module) or (is_data and not isinstance(leaf, str | bytes)):
            yield leaf


def fresh_model(task: Task, probe: Sequence[Example]) -> nn.Module:
    """A copy of the task's model, with the sizes of lazy modules taken from a forward pass."""
    model = task.model()
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose layers cannot be watched
    _check_copyable(model)
    model = copied(model)
    if any(is_lazy(value) for value in [*model.parameters(), *model.buffers()]):
        with torch.no_grad():
            task.loss(model.eval(), task.collate(list(probe)))
    return model


def copied(model: nn.Module) -> nn.Module:
    """Tensors that hooks compute from a model's parameters (weight_norm, pruning) are computed anew by the copy."""
    derived = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(model, dict(derived))


def _check_copyable(model: nn.Module) -> None:
    """Raises UnsupportedLayerError for what a copy would lose, or share with the original, without a word."""
    for name, module in model.named_modules():
        cells = getattr(vars(module).get("forward"), "__closure__", None) or ()
        if any(isinstance(cell.cell_contents, nn.Module) for cell in cells):
            raise UnsupportedLayerError(
                f"the forward of {name or 'the model'} was replaced by a function that holds a module of its own, "
                "which a copy of the model would go on using: override forward in a class, or use types.MethodType"
            )
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        raise UnsupportedLayerError(
            f"{hooked[0]} has a hook on its gradient (register_hook), which per-example gradients would miss: remove "
            "it in Task.model"
        )
