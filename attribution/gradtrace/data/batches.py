"""Batches of examples that go through a model together, and measures (losses) of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradtrace.task import Batch, Example, Task

# The function of each example that is differentiated: task.loss or task.measurement. (model, collated batch) -> [batch]
Measure = Callable[[nn.Module, Batch], Tensor]


def measure_at(measure: Measure, positions: Tensor) -> Measure:
    """The measure for a batch that holds only the examples at `positions`, int64 [n], of a larger batch.

    It is the same measure, unless that treats examples differently by their position, as `SeededLoss` does.
    """
    return measure.at(positions) if hasattr(measure, "at") else measure


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Examples, and the batch that the task collates them to, on the model's device.

    The examples are kept because some models can only be differentiated one example at a time, and a batch cannot be
    split in general: its examples may be in one flat list (graphs, bags of tokens).

    float64: floating-point tensors of `collated` are converted to float64
    """

    task: Task
    examples: Sequence[Example]
    device: torch.device
    collated: Batch
    float64: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def uniform(self) -> bool:
        """Whether all examples have the same size, so that none is padded."""
        return len({size_of(example) for example in self.examples}) <= 1

    def chosen(self, positions: Sequence[int]) -> ExampleBatch:
        """A batch of the examples at these positions."""
        return collate(self.task, [self.examples[position] for position in positions], self.device, self.float64)

    def alone(self, position: int) -> ExampleBatch:
        """A batch of one example."""
        return self.chosen([position])


def values_of(measure: Measure, model: nn.Module, batch: Batch) -> Tensor:
    """The values of a measure, without a graph. Without no_grad if the loss itself differentiates the model."""
    try:
        with torch.no_grad():
            return measure(model, batch)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        values = measure(model, batch)
        return values.detach() if isinstance(values, Tensor) else values


def size_of(example: Example) -> int:
    """The size of an example: the number of values of tensors and arrays, and of characters of texts."""
    return sum(_leaf_size(leaf) for leaf in tree_leaves(example))


def _leaf_size(leaf: Any) -> int:
    if isinstance(leaf, Tensor | np.ndarray):
        return leaf.numel() if isinstance(leaf, Tensor) else leaf.size
    return len(leaf) if isinstance(leaf, str | bytes) else 1


def collate(task: Task, examples: Sequence[Example], device: torch.device, float64: bool = False) -> ExampleBatch:
    """Collate examples and move their tensors to a device.

    Tensors are detached: a data set may hold tensors that require a gradient, which a backward pass would write to.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, torch.float64 if float64 and leaf.is_floating_point() else leaf.dtype)

    return ExampleBatch(task, examples, device, tree_map(moved, task.collate(list(examples))), float64)
