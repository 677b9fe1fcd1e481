"""Scores from the stored gradient rows: inner products with the query's coordinates, reweighted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.devices import map_in_threads
from gradtrace.methods.method import Scoring
from gradtrace.models.queries import QUERY_BATCH, Query, explained_batches, named_in_errors, query_batches
from gradtrace.models.task_model import MeasureName
from gradtrace.search.scored_rows import Floats
from gradtrace.task import Example

_BLOCK_VALUES = 1 << 23  # float32 values of stored rows that are held at a time


class GradientScoring(Scoring):
    """Query vectors are the query's coordinates times a factor for each column.

    Args:
        blocks: column blocks, see `Scoring`.
        factors: float32 [blocks, 1 or dimensions].
        query_at: for each block the checkpoint at which the query's gradient is taken; None: the block's own.
    """

    bases: Sequence[Basis]

    def __init__(
        self, contents: IndexContents, blocks: list[int], factors: Tensor, query_at: list[int] | None = None
    ) -> None:
        self.store, self.searcher = contents.store, contents.searcher
        self.blocks, self.query_at = blocks, blocks if query_at is None else query_at
        self.bases = [contents.basis_of(block) for block in blocks]
        self.factors = factors.to(contents.models[0].device)
        self._contents = contents

    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        last = self._contents.manifest.last_checkpoint
        model, checkpoints = self._contents.models[last], sorted(set(self.query_at))
        losses = [math.nan] * len(queries)
        widths = [self._contents.basis_of(block).coordinates for block in self.query_at]
        coordinates = [torch.empty(len(queries), width, device=model.device) for width in widths]
        for numbers, measure in query_batches(model, queries):
            asked = [queries[number] for number in numbers]
            batches, at_other_labels = explained_batches(model, asked), bool(asked[0].relabelled)
            with named_in_errors(numbers):
                # Every checkpoint has a model of its own, so they run side by side.
                encode = partial(self._encode_explained, batches=batches, measure=measure)
                by_checkpoint = dict(zip(checkpoints, map_in_threads(encode, checkpoints, model.device), strict=True))
                has_losses = measure == "loss" and last in by_checkpoint and not at_other_labels
                with_labels = model.batch([query.example for query in asked]) if at_other_labels else batches[0]
                values = by_checkpoint[last][1] if has_losses else model.losses(with_labels)
            for position, checkpoint in enumerate(self.query_at):
                coordinates[position][numbers] = by_checkpoint[checkpoint][0]
            for number, value in zip(numbers, values.tolist(), strict=True):
                losses[number] = value
        return self.reweighted(self._rotated(coordinates)), losses

    def _rotated(self, coordinates: Sequence[Tensor]) -> Tensor:
        """[queries, coordinates] at each block -> [queries, blocks, dimensions]. A rotation is large: it is read once
        for all checkpoints of its run."""
        rows = coordinates[0].new_empty(len(coordinates[0]), len(coordinates), self.store.dimensions)
        entries = self._contents.manifest.checkpoints
        for run, basis in enumerate(self._contents.bases):
            of_run = [position for position, block in enumerate(self.query_at) if entries[block].run == run]
            if of_run:
                rows[:, of_run] = basis.rotated(torch.stack([coordinates[position] for position in of_run], dim=1))
        return rows

    def _encode_explained(
        self, checkpoint: int, batches: Sequence[ExampleBatch], measure: MeasureName
    ) -> tuple[Tensor, Tensor]:
        """`encode` of the first batch, minus that of a second one for a contrast."""
        coordinates, values = self.encode(checkpoint, batches[0], measure)
        for subtracted in batches[1:]:
            coordinates = coordinates - self.encode(checkpoint, subtracted, measure)[0]
        return coordinates, values

    def encode(self, checkpoint: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        """A batch of queries at one checkpoint: the coordinates of the measure's gradients before the basis's rotation,
        float32 [batch, coordinates], and the measured values [batch]."""
        model = self._contents.models[checkpoint]
        return model.encode(self._contents.basis_of(checkpoint).unrotated, batch, model.measure(measure))

    def reweighted(self, coordinates: Tensor) -> Tensor:
        """The query vectors of coordinates [queries, blocks, dimensions] of gradients at `query_at`."""
        return coordinates * self.factors

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        models = [self._contents.models[block] for block in self.blocks]
        vectors = []
        for start in range(0, len(examples), QUERY_BATCH):
            batch = examples[start : start + QUERY_BATCH]
            with named_in_errors(range(start, start + len(batch)), "training example"):
                rows = [
                    model.encode(basis, model.batch(batch))[0] for model, basis in zip(models, self.bases, strict=True)
                ]
            vectors.append(torch.stack(rows, dim=1))
        return torch.cat(vectors)

    def self_influence(self) -> Floats:
        """The stored rows stand for the gradients of queries too."""
        read = sorted({*self.blocks, *self.query_at})
        asked, scored = ([read.index(block) for block in blocks] for blocks in (self.query_at, self.blocks))
        scores = torch.empty(self.store.rows)
        size = max(1, _BLOCK_VALUES // (self.store.dimensions * len(read)))
        for start, rows in self.store.blocks(read, size):  # [b, len(read), D]
            queries = self.queries_of_rows(rows[:, asked], start).to(self.factors.device)
            scores[start : start + len(rows)] = (self.reweighted(queries).cpu() * rows[:, scored]).sum((1, 2))
        scale = self.row_scale()
        values: Floats = (scores if scale is None else scores * scale).numpy()
        return values

    def queries_of_rows(self, rows: Tensor, start: int) -> Tensor:
        """The coordinates that the stored rows [b, blocks, dimensions] from `start` on would have as queries."""
        return rows
