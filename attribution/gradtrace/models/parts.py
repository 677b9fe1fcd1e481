"""Batches whose examples do not all go through the model together, since padding would cost too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradtrace.data.batches import ExampleBatch, Measure, measure_at
from gradtrace.errors import LossError

R = TypeVar("R")  # the rows of examples

Compute = Callable[[ExampleBatch, Measure], tuple[R, Tensor]]  # rows, and the measure's values [batch]


def in_parts(
    batch: ExampleBatch,
    measure: Measure,
    compute: Compute[R],
    joined: Callable[[Sequence[R], Sequence[int]], R],
) -> tuple[R, Tensor]:
    """What `compute` gives for a batch, from the parts in which the task lets it go through the model.

    joined: from the rows of the parts, and of each example of the batch its place among them
    """
    parts = batch.task.parts(batch.examples)
    if len(parts) == 1:
        return compute(batch, measure)
    computed = [_of_part(batch, measure, part, compute) for part in parts]
    places = places_in(parts)
    return joined([rows for rows, _ in computed], places), torch.cat([values for _, values in computed])[places]


def _of_part(batch: ExampleBatch, measure: Measure, part: Sequence[int], compute: Compute[R]) -> tuple[R, Tensor]:
    try:
        return compute(batch.chosen(part), measure_at(measure, torch.tensor(part, device=batch.device)))
    except LossError as error:
        raise LossError(str(error), [part[position] for position in error.positions]) from error


def places_in(parts: Sequence[Sequence[int]]) -> list[int]:
    """The place of each example of a batch among those of its parts, one after the other."""
    places: list[int] = torch.tensor([position for part in parts for position in part]).argsort().tolist()
    return places


def joined_tensors(tensors: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """Of the parts [examples, n] each -> [batch, n]."""
    return torch.cat(list(tensors))[list(places)]
