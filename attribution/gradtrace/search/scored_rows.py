"""Ranking rows by their scores: what a search returns, the exact scores of chosen rows, and the scores of all rows.

score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import QueryError
from gradtrace.search.integer_scan import can_scan, scan_scores
from gradtrace.store.rows import RowStore

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]

_BLOCK_VALUES = 1 << 23  # float32 values of whole rows that are held at a time
_QUERIES_PER_SCAN = 16


@dataclass(frozen=True, slots=True)
class RankingEnd:
    """Rows at one end of a ranking, the most extreme first; of equal scores the lower row comes first.

    rows: int64 [<= k];  scores: float32 [<= k];  parts: float32 [<= k, checkpoints], summing to the scores
    """

    rows: Rows
    scores: Floats
    parts: Floats


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Both ends of one query's ranking."""

    top: RankingEnd
    bottom: RankingEnd
    exact: bool
    rows_touched: int  # rows of which more than the first level was read
    rows_searched: int


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """What a search keeps of a query's ranking: rows with both ends among them, and exact scores.

    rows: int64 [m], ascending
    score_parts: float64 [m, C], summing to the scores
    exact, rows_touched, rows_searched: see `SearchResult`
    """

    rows: Rows
    score_parts: Doubles
    exact: bool
    rows_touched: int
    rows_searched: int

    def result(self, k: int) -> SearchResult:
        ends = both_ends(self.rows, self.score_parts, k)
        return SearchResult(*ends, self.exact, self.rows_touched, self.rows_searched)

    def at_the_ends(self, k: int, first: int = 0) -> ScoredRows:
        """Without the rows that are neither among the k best nor among the k worst.

        first: the position in the index of the row that is 0 here
        """
        scores = self.score_parts.sum(axis=1)
        kept = np.union1d(_end(-scores, k), _end(scores, k))
        return replace(self, rows=self.rows[kept] + first, score_parts=self.score_parts[kept])

    @classmethod
    def merged(cls, searched: Sequence[ScoredRows]) -> ScoredRows:
        """Of one query's rows that were searched apart, at least one of them; in the order of the rows."""
        return cls(
            np.concatenate([each.rows for each in searched]),
            np.concatenate([each.score_parts for each in searched]),
            all(each.exact for each in searched),
            sum(each.rows_touched for each in searched),
            sum(each.rows_searched for each in searched),
        )


@dataclass(slots=True)
class EndThresholds:
    """The k-th highest score is at least `top`, the k-th lowest at most `bottom`."""

    k: int
    top: float = -math.inf
    bottom: float = math.inf

    def tighten(self, lower: Floats | Doubles, upper: Floats | Doubles) -> None:
        """Use bounds of the scores of any k rows or more. lower, upper: [m]."""
        if len(lower) >= self.k:
            self.top = max(self.top, float(np.partition(lower, -self.k)[-self.k]))
            self.bottom = min(self.bottom, float(np.partition(upper, self.k - 1)[self.k - 1]))

    def within_reach(self, lower: Floats | Doubles, upper: Floats | Doubles) -> NDArray[np.bool_]:
        """Which rows, by bounds of their scores, may be among the k best or the k worst. bool [m]."""
        return (upper >= self.top) | (lower <= self.bottom)


def rank(
    store: RowStore, query: Doubles, checkpoints: Sequence[int], rows: Rows, k: int, row_scale: Floats | None = None
) -> tuple[RankingEnd, RankingEnd]:
    """Top and bottom of the given rows' ranking. Arguments as of `exact_parts`."""
    return both_ends(rows, exact_parts(store, query, checkpoints, rows, row_scale), k)


def exact_parts(
    store: RowStore, query: Doubles, checkpoints: Sequence[int], rows: Rows, row_scale: Floats | None = None
) -> Doubles:
    """The parts of the given rows' scores, [m, C], in float64: those of a row depend on no other row.

    query: [C, D], C = len(checkpoints);  rows: [m], ascending;  row_scale: [all rows]
    """
    score_parts = np.zeros((len(rows), len(checkpoints)))
    chunk = max(1, _BLOCK_VALUES // (store.dimensions * len(checkpoints)))
    for start in range(0, len(rows), chunk):
        values = store.gather(checkpoints, rows[start : start + chunk]).numpy()  # [m, C, D]
        for position, columns in enumerate(query):  # one checkpoint's values stay in the cache
            products = values[:, position] * columns  # float64 [m, D]
            score_parts[start : start + chunk, position] = products.sum(axis=1)  # by row: equal rows score equally
    if row_scale is not None:
        score_parts *= row_scale[rows].astype(np.float64)[:, None]
    return score_parts


def both_ends(rows: Rows, score_parts: Doubles, k: int) -> tuple[RankingEnd, RankingEnd]:
    """The k best and the k worst of scored rows.

    rows: [m], ascending, so that a stable sort puts the lower of two equally scored rows first
    score_parts: [m, C], summing to the scores
    """
    scores = score_parts.sum(axis=1)

    def end(keys: Doubles) -> RankingEnd:
        order = _end(keys, k)
        return RankingEnd(rows[order], scores[order].astype(np.float32), score_parts[order].astype(np.float32))

    return end(-scores), end(scores)


def _end(keys: Doubles, k: int) -> Rows:
    """Where the k lowest keys are, the lowest first; of equal keys the first comes first."""
    return np.argsort(keys, kind="stable")[:k]


def check_search(queries: Tensor, k: int) -> None:
    """Raises QueryError for a query that is not finite, or k < 1."""
    if k < 1:
        raise QueryError(f"k must be at least 1, not {k}")
    if not queries.isfinite().all():
        raise QueryError("the query's gradient has coordinates that are NaN or infinite")


def ends_of_scored(score_parts: Doubles, k: int, allowed: NDArray[np.bool_] | None) -> SearchResult:
    """The k best and the k worst of all rows, whose scores are known. score_parts: [rows, C], summing to the scores."""
    rows = np.arange(len(score_parts)) if allowed is None else np.flatnonzero(allowed)
    scores, thresholds = score_parts[rows].sum(axis=1), EndThresholds(k)
    thresholds.tighten(scores, scores)
    at_the_ends = rows[thresholds.within_reach(scores, scores)]  # to sort fewer rows
    return SearchResult(*both_ends(at_the_ends, score_parts[at_the_ends], k), True, len(rows), len(rows))


def exhaustive_scores(
    store: RowStore, queries: Tensor, checkpoints: Sequence[int], row_scale: Tensor | None = None
) -> Floats:
    """Every row's score for every query, [q, rows] float32, right up to float32 rounding. Rows are read in blocks, so
    that memory stays bounded.

    queries: [q, C, D] float32, C = len(checkpoints);  row_scale: [rows] float32
    """
    queries, scores = queries.cpu(), torch.empty(len(queries), store.rows)
    if can_scan(store) and len(checkpoints):
        for start in range(0, len(queries), _QUERIES_PER_SCAN):
            some = slice(start, start + _QUERIES_PER_SCAN)
            scores[some] = scan_scores(store, queries[some], checkpoints)
    else:
        flat = queries.flatten(1)  # [q, C * D]
        block_rows = max(1, _BLOCK_VALUES // (store.dimensions * max(1, len(checkpoints))))
        for start, block in store.blocks(checkpoints, block_rows):
            scores[:, start : start + len(block)] = flat @ block.flatten(1).T
    if row_scale is not None:
        scores *= row_scale.cpu()
    result: Floats = scores.numpy()
    return result
