"""Scores from the stored gradient rows: inner products with the query's coordinates, reweighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.methods.explained import encoded_queries
from gradtrace.methods.method import DenseScoring
from gradtrace.methods.position_scores import Lengths, PositionQuestion, PositionScores
from gradtrace.models.position_coordinates import check_measured, encode_positions
from gradtrace.models.queries import QUERY_BATCH, Query, named_in_errors
from gradtrace.models.task_model import MeasureName
from gradtrace.search.scored_rows import Doubles, Floats, Rows
from gradtrace.store.dense_rows import DenseRows, RowPass
from gradtrace.task import Example

_BLOCK_VALUES = 1 << 23  # float32 values of stored rows that are held at a time


@dataclass(frozen=True, eq=False)
class SelfProducts(RowPass):
    """The product of each row with itself as a query.

    asked, scored: places, among the checkpoints that are read, of the query's and of the row's blocks
    factors: of query vectors, [blocks, 1 or dimensions]
    """

    asked: Sequence[int]
    scored: Sequence[int]
    factors: Tensor

    def __call__(self, start: int, rows: Tensor) -> Tensor:
        """float32 [b]"""
        queries = self.queries(start, rows[:, self.asked].to(self.factors.device))
        products: Tensor = (queries.cpu() * rows[:, self.scored]).sum((1, 2))
        return products

    def queries(self, start: int, rows: Tensor) -> Tensor:
        """The query vectors that stored rows would have. [b, blocks, dimensions], as `rows`"""
        return rows * self.factors

    def of_rows(self, start: int, stop: int) -> SelfProducts:
        return replace(self, factors=self.factors.cpu())


class GradientScoring(DenseScoring):
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
        assert isinstance(contents.store, DenseRows)  # else rows are sparse
        assert contents.searcher is not None
        self.store, self.searcher = contents.store, contents.searcher
        self.blocks, self.query_at = blocks, blocks if query_at is None else query_at
        self.bases = [contents.basis_of(block) for block in blocks]
        self.factors = factors.to(contents.models[0].device)
        self._contents = contents

    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        coordinates, losses = self.query_coordinates(queries)
        return self.reweighted(coordinates), losses

    def query_coordinates(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        """As `query_vectors`, before they are reweighted."""
        device = self._contents.models[0].device
        losses: list[float] = []
        widths = [self._contents.basis_of(block).coordinates for block in self.query_at]
        coordinates = [torch.empty(len(queries), width, device=device) for width in widths]
        checkpoints = sorted(set(self.query_at))
        for numbers, encoded in encoded_queries(self._contents, queries, checkpoints, self._encode_explained, losses):
            for position, checkpoint in enumerate(self.query_at):
                coordinates[position][numbers] = encoded[checkpoint]
        return self._rotated(coordinates), losses

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
        self, batches: Sequence[ExampleBatch], measure: MeasureName, checkpoint: int
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

    def position_scores(self, question: PositionQuestion) -> PositionScores:
        (vector,), _ = self.query_vectors([question.query])  # [blocks, D]
        stored = self.store.gather(self.blocks, question.rows).double()  # [n, blocks, D]
        scale = self.row_scale()
        scales = np.ones(len(stored)) if scale is None else scale.cpu().numpy()[question.rows].astype(np.float64)
        of_rows = [
            self._row_positions(example, lengths, vector)
            for example, lengths in zip(question.examples, question.lengths, strict=True)
        ]
        of_query = [
            positions.double().cpu().flatten(1) @ stored.flatten(1).T  # [positions, n]
            for positions in self._query_positions(question.query, question.query_lengths)
        ]
        return PositionScores(
            (stored.flatten(1) @ vector.double().cpu().flatten()).numpy() * scales,
            [scores.numpy() * factor for scores, factor in zip(of_rows, scales, strict=True)],
            [scores.numpy() * scales for scores in of_query],
        )

    def _row_positions(self, example: Example, lengths: Lengths, vector: Tensor) -> Tensor:
        """The products of a training example with a query's vector, before the row's scale. float64 [positions]"""
        scores = torch.zeros(sum(lengths), dtype=torch.float64)
        for block, basis, columns in zip(self.blocks, self.bases, vector, strict=True):
            rows, _ = encode_positions(self._contents.models[block], basis, example, lengths)
            scores += (rows.double() @ columns.double()).cpu()
        return scores

    def _query_positions(self, query: Query, lengths: Sequence[Lengths]) -> list[Tensor]:
        """Of each example that is explained [positions, blocks, dimensions], which sum to the query's vector."""
        check_measured(self._contents.models[self.query_at[0]], query)
        vectors = []
        for number, example in enumerate(query.explained):
            by_checkpoint = {
                checkpoint: self.encode_positions(checkpoint, example, lengths[number], query.measure)[0]
                for checkpoint in dict.fromkeys(self.query_at)
            }
            coordinates = self._rotated([by_checkpoint[checkpoint] for checkpoint in self.query_at])
            vectors.append(self.reweighted_positions(coordinates, query) * (-1 if number else 1))
        return vectors

    def encode_positions(
        self, checkpoint: int, example: Example, lengths: Lengths, measure: MeasureName
    ) -> tuple[Tensor, Tensor]:
        """As `encode`, of one example by position: [positions, coordinates], and the measured value [1]."""
        model, basis = self._contents.models[checkpoint], self._contents.basis_of(checkpoint).unrotated
        return encode_positions(model, basis, example, lengths, model.measure(measure))

    def reweighted_positions(self, coordinates: Tensor, query: Query) -> Tensor:
        """As `reweighted`, of the coordinates of one query by position."""
        return self.reweighted(coordinates)

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
        size = max(1, _BLOCK_VALUES // (self.store.dimensions * len(read)))
        scores = self.store.each_row(read, size, self.self_products(asked, scored))
        scale = self.row_scale()
        values: Floats = (scores if scale is None else scores * scale).numpy()
        return values

    def self_products(self, asked: Sequence[int], scored: Sequence[int]) -> SelfProducts:
        """The scores of rows on themselves, without their scale. Arguments as of `SelfProducts`."""
        return SelfProducts(asked, scored, self.factors)

    def shares_by_layer(self, vector: Tensor, positions: Rows) -> Mapping[str, Doubles]:
        names = sorted({name for basis in self.bases for name in basis.layers})
        shares = torch.zeros(len(names), len(positions), dtype=torch.float64)
        for block, basis, query in zip(self.blocks, self.bases, vector, strict=True):
            numbers = [names.index(name) for name in sorted(basis.layers)]
            rows = self.store.gather([block], positions)[:, 0].double()  # [m, D]
            shares[numbers] += (rows @ basis.shares_by_layer(query)).T
        scale = self.row_scale()
        return dict(zip(names, (shares if scale is None else shares * scale[positions]).numpy(), strict=True))
