"""Exact search of sparse rows, through the lists of the query's coordinates alone.

score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>

Exact for the stored rows and for the query's coordinates that are given. Sums are in float64, each row's in the order
of the coordinates: they depend neither on other queries of a batch nor on how rows are divided into segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array

from gradtrace.errors import StoreError
from gradtrace.search.scored_rows import Doubles, EndThresholds, Floats, Rows, ScoredRows, SearchResult, check_search
from gradtrace.sparse.segments import MOST_ROWS, Segment
from gradtrace.sparse.vectors import SparseVectors

Mask = NDArray[np.bool_]


class SparseSearcher:
    """Both ends of all rows of an inverted index.

    rows: number of stored rows
    """

    def __init__(self, segments: Sequence[Sequence[Segment]]) -> None:
        """segments: of each checkpoint, in the order of the rows

        Raises:
            StoreError: the checkpoints' segments are of different rows.
        """
        self._stretches = list(zip(*segments, strict=False))  # of each stretch of rows, its segment at each checkpoint
        sizes = {tuple(segment.rows for segment in of_checkpoint) for of_checkpoint in segments}
        if len(sizes) > 1:
            raise StoreError(f"segments of the same rows are needed at each checkpoint, not of {sorted(sizes)} rows")
        self._starts = np.append(0, np.cumsum([stretch[0].rows for stretch in self._stretches], dtype=np.int64))
        self.rows = int(self._starts[-1])

    def search(
        self,
        queries: Sequence[SparseVectors],
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Floats | None = None,
        allowed: Mask | None = None,
    ) -> list[SearchResult]:
        """See `RowSearcher.search`. queries: at each of the checkpoints, the same number of them"""
        by_query = self.scored(queries, checkpoints, k, row_scale=row_scale, allowed=allowed)
        return [scored.result(k) for scored in by_query]

    def scored(
        self,
        queries: Sequence[SparseVectors],
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Floats | None = None,
        allowed: Mask | None = None,
    ) -> list[ScoredRows]:
        """As `search`, with exact scores that can be merged with those of other rows.

        Raises:
            CorruptIndexError: also where a file has rows that cannot be.
        """
        for vectors in queries:
            check_search(torch.from_numpy(vectors.values), k)
        ends = [_Ends(k) for _ in range(len(queries[0]) if queries else 0)]
        for number, stretch in enumerate(self._stretches):
            rows = np.arange(self._starts[number], self._starts[number + 1])
            admitted = slice(None) if allowed is None else np.flatnonzero(allowed[rows])
            for query, query_ends in enumerate(ends):
                score_parts = _score_parts(stretch, queries, query, checkpoints)
                if row_scale is not None:
                    score_parts *= row_scale[rows].astype(np.float64)[:, None]
                query_ends.add(rows[admitted], score_parts[admitted])
        return [query_ends.result() for query_ends in ends]

    def scores(
        self, queries: Sequence[SparseVectors], checkpoints: Sequence[int], *, row_scale: Floats | None = None
    ) -> Floats:
        """See `RowSearcher.scores`."""
        for vectors in queries:
            check_search(torch.from_numpy(vectors.values), 1)
        scores = np.zeros((len(queries[0]) if queries else 0, self.rows), np.float32)
        for start, stretch in zip(self._starts, self._stretches, strict=False):
            for query, of_query in enumerate(scores):
                score_parts = _score_parts(stretch, queries, query, checkpoints)
                of_query[start : start + len(score_parts)] = score_parts.sum(axis=1)
        return scores if row_scale is None else scores * row_scale

    def postings_read(self, queries: Sequence[SparseVectors], checkpoints: Sequence[int]) -> Rows:
        """The number of postings that a search reads for each query. int64 [q]."""
        read = np.zeros(len(queries[0]) if queries else 0, np.int64)
        for stretch in self._stretches:
            for c, vectors in zip(checkpoints, queries, strict=True):
                read += [stretch[c].count(coordinates) for coordinates in vectors.coordinates]
        return read


class _Ends:
    """The rows that may be among the k best or the k worst, of all rows so far."""

    def __init__(self, k: int) -> None:
        self._thresholds = EndThresholds(k)
        self._rows: list[Rows] = []
        self._score_parts: list[Doubles] = []
        self._touched = self._searched = 0

    def add(self, rows: Rows, score_parts: Doubles) -> None:
        """rows: [m], ascending and above those so far;  score_parts: [m, C]"""
        self._searched += len(rows)
        self._touched += int(np.count_nonzero(score_parts.any(axis=1)))
        for _ in range(2):  # the thresholds of earlier rows leave few, of which the new ones are soon known
            scores = score_parts.sum(axis=1)
            reach = np.flatnonzero(self._thresholds.within_reach(scores, scores))
            rows, score_parts = rows[reach], score_parts[reach]
            self._thresholds.tighten(scores[reach], scores[reach])
        self._rows.append(rows)
        self._score_parts.append(score_parts)

    def result(self) -> ScoredRows:
        if not self._rows:
            self.add(np.zeros(0, np.int64), np.zeros((0, 0)))
        rows, score_parts = np.concatenate(self._rows), np.concatenate(self._score_parts)
        return ScoredRows(rows, score_parts, True, self._touched, self._searched)


def _score_parts(
    stretch: Sequence[Segment], queries: Sequence[SparseVectors], query: int, checkpoints: Sequence[int]
) -> Doubles:
    """<query[c], row[c]> of a stretch's rows at each of the checkpoints, [rows, C]. query: its number"""
    products = [
        _products(stretch[c], vectors.coordinates[query], vectors.values[query])
        for c, vectors in zip(checkpoints, queries, strict=True)
    ]
    return np.stack(products, axis=1)


def _products(segment: Segment, coordinates: NDArray[np.uint32], values: Floats) -> Doubles:
    """The inner product of each of a segment's rows with a query. coordinates: [m], ascending;  values: [m]"""
    segment.check_size()
    present, lists = segment.lists_of(coordinates)
    row_numbers, codes, starts = segment.postings(lists)
    # one column for each list; a row for each number that a posting can name, whatever a damaged file names
    postings = csc_array((codes, row_numbers.astype(np.int32), starts.astype(np.int32)), (MOST_ROWS, len(lists)))
    products: Doubles = postings @ values[present].astype(np.float64)
    return segment.of_rows(products) * segment.scales
