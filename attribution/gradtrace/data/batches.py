"""Examples that go through a model together, collated, and each of them alone."""

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

Measure = Callable[[nn.Module, Batch], Tensor]  # task.loss or task.measurement of a collated batch: [batch]


def measure_at(measure: Measure, positions: Tensor) -> Measure:
    """What measures some examples of a batch apart from the others, at positions int64 [n] of it: of a measure that is
    not the same function of all of them, as `SeededLoss`, the part that is theirs."""
    return measure.at(positions) if hasattr(measure, "at") else measure


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Examples with what the task collates them to, on the device where the model is.

    The examples are kept because some models can only be differentiated one example at a time, and a batch cannot be
    taken apart in general: its examples may lie in one flat list (graphs, bags of tokens).
    """

    task: Task
    examples: Sequence[Example]
    device: torch.device
    collated: Batch
    double: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def uniform(self) -> bool:
        """Whether all examples are of one size, so that none is padded to another's."""
        return len({size_of(example) for example in self.examples}) <= 1

    def chosen(self, positions: Sequence[int]) -> ExampleBatch:
        """Some of the examples, collated anew."""
        return collate(self.task, [self.examples[position] for position in positions], self.device, self.double)

    def alone(self, position: int) -> ExampleBatch:
        """A batch of one example."""
        return self.chosen([position])

    def in_double(self) -> ExampleBatch:
        """With float64 in place of other floating-point tensors."""
        return collate(self.task, self.examples, self.device, double=True)


def values_of(measure: Measure, model: nn.Module, batch: Batch) -> Tensor:
    """What a measure gives, without a graph. A loss may differentiate the model itself, which no_grad would forbid."""
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
    """How much an example holds: values of tensors and arrays, characters of texts."""
    return sum(_leaf_size(leaf) for leaf in tree_leaves(example))


def _leaf_size(leaf: Any) -> int:
    if isinstance(leaf, Tensor | np.ndarray):
        return leaf.numel() if isinstance(leaf, Tensor) else leaf.size
    return len(leaf) if isinstance(leaf, str | bytes) else 1


def collate(task: Task, examples: Sequence[Example], device: torch.device, double: bool = False) -> ExampleBatch:
    """Collate examples and move their tensors to a device. Tensors are detached: a data set may keep ones that require
    a gradient, which a backward pass would write to."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, torch.float64 if double and leaf.is_floating_point() else leaf.dtype)

    return ExampleBatch(task, examples, device, tree_map(moved, task.collate(list(examples))), double)
