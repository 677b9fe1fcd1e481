"""Scores from sparse rows: products of the coordinates that a row keeps with those of the query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.errors import QueryError
from gradtrace.fitted.curvature import ALL_COLUMNS, Columns
from gradtrace.methods.explained import encoded_queries
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Scoring
from gradtrace.methods.norms import inverse, inverse_row_norms, live_norms, squared_norm_sums
from gradtrace.methods.position_scores import PositionQuestion, PositionScores
from gradtrace.methods.sparse_positions import Multipliers, split_block, values_at
from gradtrace.methods.vectors import SparseQueries
from gradtrace.models.queries import QUERY_BATCH, Query, named_in_errors
from gradtrace.models.task_model import MeasureName
from gradtrace.search.scored_rows import Doubles, Floats, Rows, SearchResult
from gradtrace.sparse.factors import ComputedFactors
from gradtrace.sparse.inverted_rows import InvertedRows
from gradtrace.sparse.strongest import strongest_of_batches
from gradtrace.sparse.vectors import SparseRows, SparseVectors
from gradtrace.task import Example

QUERY_COORDINATES = 4096  # LDS on a small GPT-2: .603 with 1,024, .617 with 4,096, .615 with 16,384

# Of a block, by its place among the blocks, and some of its columns. Floating point [n], or [1] for all of them
BlockFactors = Callable[[int, Columns], Tensor]


class SparseScoring(Scoring[SparseQueries]):
    """Query vectors are the strongest QUERY_COORDINATES of the query's gradient, whitened and times a factor.

    Rows keep whitened coordinates w g, so the query's q become q factor / w: the whitening decides which coordinates
    count, and is otherwise undone.

    Args:
        blocks: column blocks, see `Scoring`; the query's gradient is taken at each block's checkpoint.
        factors: of each block's coordinates.
        normalized, full_gradient_weights: see `Scoring`.
    """

    store: InvertedRows

    def __init__(
        self,
        contents: IndexContents,
        blocks: list[int],
        factors: BlockFactors,
        full_gradient_weights: Doubles | None = None,
        normalized: bool = False,
    ) -> None:
        assert isinstance(contents.store, InvertedRows)
        self.store, self.blocks, self._contents, self._factors = contents.store, blocks, contents, factors
        self.full_gradient_weights, self.normalized = full_gradient_weights, normalized

    def query_vectors(self, queries: Sequence[Query]) -> tuple[SparseQueries, list[float]]:
        rows, losses = self._query_rows(queries)
        return self._vectors(rows), losses

    def _query_rows(self, queries: Sequence[Query]) -> tuple[list[tuple[SparseRows, ...]], list[float]]:
        """At each block, of each query; and the queries' losses."""
        losses: list[float] = []
        by_query: dict[int, list[SparseRows]] = {}
        for numbers, encoded in encoded_queries(self._contents, queries, self.blocks, self._encode, losses):
            for place, number in enumerate(numbers):
                by_query[number] = [_one(encoded[block], place) for block in self.blocks]
        in_order = [by_query[number] for number in range(len(queries))]
        return list(zip(*in_order, strict=True)), losses

    def _vectors(self, rows: Sequence[Sequence[SparseRows]]) -> SparseQueries:
        """rows: at each block, of each query or example; divided by the norms over all blocks, where scores are"""
        by_block = [SparseVectors.joined([row.vectors for row in of_block]) for of_block in rows]
        scale = self._inverse_norms(rows)
        return SparseQueries(by_block if scale is None else [vectors.times(scale) for vectors in by_block])

    def _inverse_norms(self, rows: Sequence[Sequence[SparseRows]]) -> Floats | None:
        """Of each query or example; None where scores are not divided by norms."""
        if not self.normalized:
            return None
        norms = torch.tensor([[float(row.norms[0]) for row in of_block] for of_block in rows], dtype=torch.float64)
        inverses: Floats = inverse(norms.norm(dim=0)).float().numpy()
        return inverses

    def _encode(
        self, batches: Sequence[ExampleBatch], measure: MeasureName, checkpoint: int
    ) -> tuple[SparseRows, Tensor]:
        model = self._contents.models[checkpoint]
        if measure == "measurement" and not model.examination.measurement:
            raise QueryError(
                "the measurement could not be tried on training examples, nor on task.query, as sparse rows need: give "
                'the task a query data set that has what it needs, or ask for target "loss"'
            )
        factors = self._query_factors(self.blocks.index(checkpoint))
        return strongest_of_batches(model, batches, model.measure(measure), factors, QUERY_COORDINATES)

    def _query_factors(self, place: int) -> ComputedFactors:
        """Of a block, by its place among the blocks: the factor over the whitening."""
        return self._over_whitening(place, 1)

    def _over_whitening(self, place: int, power: int) -> ComputedFactors:
        """The factors over a power of the whitening, 0 where that is 0."""

        def of_columns(columns: Columns) -> Tensor:
            whitening = self._contents.whitening(self.blocks[place], columns).double()
            return torch.where(whitening > 0, self._factors(place, columns) / whitening**power, 0)

        return ComputedFactors(of_columns, self._contents.columns_of_curvature)

    def _whitening(self, block: int) -> ComputedFactors:
        return ComputedFactors(partial(self._contents.whitening, block), self._contents.columns_of_curvature)

    def row_vectors(self, examples: Sequence[Example]) -> SparseQueries:
        rows = [
            [row for start in range(0, len(examples), QUERY_BATCH) for row in self._rows(block, examples, start)]
            for block in self.blocks
        ]
        return self._vectors(rows)

    def _rows(self, block: int, examples: Sequence[Example], start: int) -> list[SparseRows]:
        """A batch of examples as they would be stored, but not rounded."""
        model, batch = self._contents.models[block], examples[start : start + QUERY_BATCH]
        with named_in_errors(range(start, start + len(batch)), "training example"):
            kept, whitening = self._contents.manifest.basis.dimensions, self._whitening(block)
            rows, _ = strongest_of_batches(model, [model.batch(batch)], None, whitening, kept)
        return [_one(rows, place) for place in range(len(batch))]

    def search(self, vectors: SparseQueries, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        return self.store.searcher.search(vectors.by_block, self.blocks, k, row_scale=self._scale(), allowed=allowed)

    def scores(self, vectors: SparseQueries) -> Floats:
        return self.store.searcher.scores(vectors.by_block, self.blocks, row_scale=self._scale())

    def products(self, vectors: SparseQueries, rows: SparseQueries) -> Floats:
        by_block = zip(vectors.by_block, rows.by_block, strict=True)
        total: Doubles = np.sum([q.entries().products(r.entries()) for q, r in by_block], axis=0)
        return total.astype(np.float32)

    def row_scale(self) -> Tensor | None:
        """Of normalized scores 1 / norm over all blocks, 0 for rows without a direction. float32 [stored rows]"""
        if not self.normalized:
            return None
        return inverse_row_norms(live_norms(self.store, self.blocks))

    def _scale(self) -> Floats | None:
        scale = self.row_scale()
        return None if scale is None else scale.numpy()

    def self_influence(self) -> Floats:
        """By methods that weigh checkpoints alone, from the whole gradients' norms; by others, from the coordinates
        that rows keep."""
        if (scale := self._scale()) is not None:
            return (scale > 0).astype(np.float32)
        if self.full_gradient_weights is not None:
            return squared_norm_sums(live_norms(self.store, self.blocks), self.full_gradient_weights)
        sums = np.zeros(self.store.rows)
        for place, block in enumerate(self.blocks):
            factors = self._over_whitening(place, 2).whole().double()
            sums += self.store.square_sums(block, factors.numpy())
        return sums.astype(np.float32)

    def shares_by_layer(self, vector: SparseQueries, positions: Rows) -> Mapping[str, Doubles]:
        coordinates = self._contents.coordinates
        names = sorted({name for of_run in coordinates for name in of_run.shapes})
        shares = np.zeros((len(names), len(positions)))
        for block, query in zip(self.blocks, vector.by_block, strict=True):
            rows = self.store.gather(block, positions)
            products = rows.values * values_at(query, rows.coordinates)
            of_run = coordinates[self._contents.manifest.checkpoints[block].run]
            starts = np.array([part.start for part in of_run.slices.values()])
            layers = np.searchsorted(starts, rows.coordinates, side="right") - 1
            numbers = np.array([names.index(name) for name in of_run.slices])[layers]
            np.add.at(shares, (numbers, rows.places), products)
        scale = self._scale()
        return dict(zip(names, shares if scale is None else shares * scale[positions], strict=True))

    def position_scores(self, question: PositionQuestion) -> PositionScores:
        rows, _ = self._query_rows([question.query])
        inverse_norms, vectors, split = self._inverse_norms(rows), self._vectors(rows).by_block, []
        for place, block in enumerate(self.blocks):
            scaled = Multipliers(
                self._whitening(block),
                self._query_factors(place),
                1.0 if inverse_norms is None else float(inverse_norms[0]),
            )
            model = self._contents.models[block]
            split.append(split_block(self.store, block, model, vectors[place], scaled, question))
        scale = self._scale()
        return PositionScores.summed(split, np.ones(len(question.rows)) if scale is None else scale[question.rows])

    def row_products(self, positions: Rows) -> Doubles:
        order = np.argsort(positions)
        products = np.zeros((len(positions), len(positions)))
        for block in self.blocks:
            rows = self.store.gather(block, positions[order])
            products += rows.products(rows)
        back = np.argsort(order)
        return products[np.ix_(back, back)]


def scoring_of_rows(
    contents: IndexContents, blocks: list[int], factors: BlockFactors, query_at: list[int] | None = None
) -> Scoring[Any]:
    """Of rows of the index's kind. Queries of sparse rows are always taken at each block's own checkpoint.

    factors: of each block's columns;  query_at: see `GradientScoring`
    """
    if contents.is_sparse:
        return SparseScoring(contents, blocks, factors)
    by_block = torch.stack([factors(place, ALL_COLUMNS) for place in range(len(blocks))])
    return GradientScoring(contents, blocks, by_block.float(), query_at)


def weights_alone(weights: Doubles) -> BlockFactors:
    """Factors that are the same for all columns of a block. weights: float64 [blocks]"""
    values = torch.from_numpy(weights)
    return lambda place, columns: values[place, None]


def _one(rows: SparseRows, place: int) -> SparseRows:
    return SparseRows(rows.vectors[place : place + 1], rows.norms[place : place + 1])
