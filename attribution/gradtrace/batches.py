"""Examples that go through a model together, collated, and each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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

    def chosen(self, positions: Sequence[int]) -> ExampleBatch:
        """Some of the examples, collated anew."""
        return collate(self.task, [self.examples[position] for position in positions], self.device, self.double)

    def alone(self, position: int) -> ExampleBatch:
        """A batch of one example."""
        return self.chosen([position])

    def in_double(self) -> ExampleBatch:
        """With float64 in place of other floating-point tensors."""
        return collate(self.task, self.examples, self.device, double=True)


def collate(task: Task, examples: Sequence[Example], device: torch.device, double: bool = False) -> ExampleBatch:
    """Collate examples and move their tensors to a device. Tensors are detached: a data set may keep ones that require
    a gradient, which a backward pass would write to."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, torch.float64 if double and leaf.is_floating_point() else leaf.dtype)

    return ExampleBatch(task, examples, device, tree_map(moved, task.collate(list(examples))), double)
