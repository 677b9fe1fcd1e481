"""Samples of training rows to check a model on: of different sizes and labels, in several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.data.batches import ExampleBatch, collate, size_of
from gradtrace.data.dataset import fetch
from gradtrace.task import Example, Task

SAMPLE_ROWS = 16
_CANDIDATES = 64  # rows that are read to choose from
# Sizes of smaller batches of the sample. A dimension that has the batch's size in all of them is the batch's.
_SIZES = (7, 3, 2)


@dataclass(frozen=True, eq=False)
class Sample:
    """Training rows to check a model on.

    rows: their numbers, for messages
    batches: the batches in which they go through the model, as positions in `rows`
    """

    rows: Sequence[int]
    examples: ExampleBatch
    batches: Sequence[Sequence[int]]

    def batch(self, positions: Sequence[int]) -> ExampleBatch:
        return self.examples.chosen(positions)

    def part(self, positions: Sequence[int]) -> Sample:
        """The sample with only the examples at these positions."""
        new_position = {position: number for number, position in enumerate(positions)}
        batches = [[new_position[position] for position in batch if position in new_position] for batch in self.batches]
        rows = [self.rows[position] for position in positions]
        return Sample(rows, self.examples.chosen(positions), [batch for batch in batches if batch])

    def in_float64(self) -> Sample:
        batch = self.examples
        return replace(self, examples=collate(batch.task, batch.examples, batch.device, float64=True))


def sample_of(
    task: Task, rows: Sequence[int], examples: Sequence[Example], device: torch.device, largest: int = SAMPLE_ROWS
) -> Sample:
    """A sample of these examples: a batch of all of them and smaller batches, in random order.

    rows: the examples' numbers.  largest: size of a batch at most
    """
    count, draw = len(examples), np.random.default_rng(0)
    sizes = dict.fromkeys(min(size, count, max(largest, _SIZES[-2])) for size in (count, *_SIZES))
    return Sample(rows, collate(task, examples, device), [draw.permutation(count)[:size].tolist() for size in sizes])


def varied_rows(task: Task, count: int = SAMPLE_ROWS, among: NDArray[np.int64] | None = None) -> list[int]:
    """Numbers of training rows, ascending, that differ in size and label as far as 64 random ones allow.

    Alike rows would hide problems that others have. The same arguments give the same rows.

    among: int64 [n], the rows to choose from; None: all
    """
    shuffled = np.random.default_rng(0).permutation(len(task.train))
    candidates = (shuffled if among is None else shuffled[np.isin(shuffled, among)])[:_CANDIDATES].tolist()
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for row, example in zip(candidates, fetch(task.train, candidates), strict=True):
        kinds.setdefault((size_of(example), _label(task, example)), []).append(row)
    chosen: list[int] = []
    by_size = sorted(kinds, key=lambda kind: kind[0])
    ends_first = [kind for pair in zip(by_size, reversed(by_size), strict=True) for kind in pair]  # small, large, ...
    while len(chosen) < min(count, len(candidates)):
        for kind in dict.fromkeys(ends_first):
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop())
    return sorted(chosen)


def _label(task: Task, example: Example) -> Any:
    try:
        return str(task.label(example))
    except Exception:  # reported where labels are read
        return None
