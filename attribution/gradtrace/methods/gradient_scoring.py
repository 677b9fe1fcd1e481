"""Scores from the stored gradient rows: the query's own coordinates, reweighted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.devices import map_in_threads
from gradtrace.methods.method import Floats, Scoring
from gradtrace.models.queries import QUERY_BATCH, Query, named_in_errors, query_batches
from gradtrace.models.task_model import MeasureName
from gradtrace.task import Example

Encoded = tuple[Tensor, Tensor]
Encode = Callable[[int, ExampleBatch, MeasureName], Encoded]  # see GradientScoring.encode

_BLOCK_VALUES = 1 << 23  # float32 values of stored rows that are held at a time


class GradientScoring(Scoring):
    """Query vectors are the query's coordinates times a factor for each column.

    Args:
        blocks: column blocks, see `Scoring`.
        query_at: for each block the checkpoint at which the query's gradient is taken; None: its own.
        factors: float32 [blocks, 1 or dimensions].
    """

    bases: Sequence[Basis]

    def __init__(
        self, contents: IndexContents, blocks: list[int], factors: Tensor, query_at: list[int] | None = None
    ) -> None:
        self.store, self.searcher = contents.store, contents.searcher
        self.blocks, self.query_at = blocks, blocks if query_at is None else query_at
        self.bases = [contents.basis_of(block) for block in blocks]
        self._contents = contents
        self._factors = factors.to(contents.models[0].device)

    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        coordinates, losses = query_coordinates(self._contents, queries, self.query_at, self.encode)
        return self.reweighted(coordinates), losses

    def encode(self, at: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        """What stands for a batch of queries at one checkpoint: coordinates float32 [batch, dimensions], by default of
        the gradients of what is measured; and the measured values [batch]."""
        model = self._contents.models[at]
        return model.encode(self._contents.basis_of(at), batch, model.measure(measure))

    def reweighted(self, coordinates: Tensor) -> Tensor:
        """The query vectors of coordinates [queries, blocks, dimensions] of gradients at `query_at`."""
        return coordinates * self._factors

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        encoders = [(self._contents.models[block], basis) for block, basis in zip(self.blocks, self.bases, strict=True)]
        vectors = []
        for start in range(0, len(examples), QUERY_BATCH):
            part = examples[start : start + QUERY_BATCH]
            with named_in_errors(range(start, start + len(part)), "training example"):
                vectors.append(
                    torch.stack([model.encode(basis, model.batch(part))[0] for model, basis in encoders], dim=1)
                )
        return torch.cat(vectors)

    def self_influence(self) -> Floats:
        """From the stored rows, taken for the gradients of queries as well."""
        read = sorted({*self.blocks, *self.query_at})
        asked, scored = ([read.index(block) for block in blocks] for blocks in (self.query_at, self.blocks))
        scores = torch.empty(self.store.rows)
        size = max(1, _BLOCK_VALUES // (self.store.dimensions * len(read)))
        for start, rows in self.store.blocks(read, size):  # [b, len(read), D]
            vectors = self.reweighted(rows[:, asked].to(self._factors.device)).cpu()
            scores[start : start + len(rows)] = (vectors * rows[:, scored]).sum((1, 2))
        scale = self.row_scale()
        values: Floats = (scores if scale is None else scores * scale).numpy()
        return values


def query_coordinates(
    contents: IndexContents, queries: Sequence[Query], checkpoints: Sequence[int], encode: Encode
) -> tuple[Tensor, list[float]]:
    """What `encode` gives for the queries, float32 [queries, len(checkpoints), dimensions], and their losses at the
    last checkpoint, from the same pass where it is the loss that is explained there.

    Raises:
        LossError: a loss or a gradient is NaN or infinite; `positions` are the numbers of these queries.
    """
    models, last = contents.models, contents.manifest.last_checkpoint
    losses = [math.nan] * len(queries)
    out = torch.empty(len(queries), len(checkpoints), contents.store.dimensions, device=models[0].device)
    for part, measure in query_batches(models[last], queries):
        batch = models[last].batch([queries[number].example for number in part])
        with named_in_errors(part):
            encoded = _at_each(sorted(set(checkpoints)), batch, measure, encode, models[last].device)
            known = measure == "loss" and last in encoded
            values = encoded[last][1] if known else models[last].losses(batch)
        for position, at in enumerate(checkpoints):
            out[part, position] = encoded[at][0]
        for number, value in zip(part, values.tolist(), strict=True):
            losses[number] = value
    return out, losses


def _at_each(
    checkpoints: Sequence[int], batch: ExampleBatch, measure: MeasureName, encode: Encode, device: torch.device
) -> dict[int, Encoded]:
    """Every checkpoint has a model of its own, so they run side by side."""
    found = map_in_threads(lambda at: encode(at, batch, measure), checkpoints, device)
    return dict(zip(checkpoints, found, strict=True))
