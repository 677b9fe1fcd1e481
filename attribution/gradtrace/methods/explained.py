"""Queries in batches, encoded at several checkpoints side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.devices import map_in_threads
from gradtrace.models.queries import Query, explained_batches, named_in_errors, query_batches
from gradtrace.models.task_model import MeasureName

T = TypeVar("T")
# From one batch, or two whose gradients are subtracted, what is measured, and a checkpoint, to the encoded gradients
# and the measured values [batch].
Encode = Callable[[Sequence[ExampleBatch], MeasureName, int], tuple[T, Tensor]]


def encoded_queries(
    contents: IndexContents,
    queries: Sequence[Query],
    checkpoints: Sequence[int],
    encode: Encode[T],
    losses: list[float],
) -> Iterator[tuple[list[int], dict[int, T]]]:
    """The numbers of the queries in each batch, and what they are encoded to at each of the checkpoints.

    losses: of the queries at the last checkpoint; they are filled in

    Raises:
        LossError: as `encode`, with the numbers of the queries.
    """
    last = contents.manifest.last_checkpoint
    model = contents.models[last]
    losses[:] = [math.nan] * len(queries)
    for numbers, measure in query_batches(model, queries):
        asked = [queries[number] for number in numbers]
        batches, of_others = explained_batches(model, asked), bool(asked[0].others)
        with named_in_errors(numbers):
            # Every checkpoint has a model of its own, so they run side by side.
            at = partial(encode, batches, measure)
            by_checkpoint = dict(zip(checkpoints, map_in_threads(at, checkpoints, model.device), strict=True))
            has_losses = measure == "loss" and last in by_checkpoint and not of_others
            with_labels = model.batch([query.example for query in asked]) if of_others else batches[0]
            values = by_checkpoint[last][1] if has_losses else model.losses(with_labels)
        for number, value in zip(numbers, values.tolist(), strict=True):
            losses[number] = value
        yield numbers, {checkpoint: encoded for checkpoint, (encoded, _) in by_checkpoint.items()}
