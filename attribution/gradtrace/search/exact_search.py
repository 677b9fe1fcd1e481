"""Exact search at both ends: which rows have the highest and which the lowest scores.

score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>

Every score is first estimated, in one of two ways, whichever is likely to take less time for the query:

- Pruning: the first level (the first columns) of every row is scanned in memory. By Cauchy-Schwarz, the rest of a score
  is at most the sum over the other levels of |query's columns| |row's columns|, with the stored norms of the rows.
- Scanning: all columns of the rows are multiplied with the query rounded to integers (`integer_scan`). What rounding
  took away from the query is bounded in the same way.

A row whose bounds reach neither the k best nor the k worst scores known so far is dropped. For the remaining rows, what
an estimate lacks is read level by level, first at the checkpoint that leaves the widest bounds. Where the bounds prune
no row, all levels of all rows are read in order, and the answer is just as exact. Scores of the last remaining rows are
computed in float64: they do not depend on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.errors import QueryError
from gradtrace.search.integer_scan import can_scan, round_queries, scan
from gradtrace.search.product_error import product_error
from gradtrace.search.scored_rows import (
    Doubles,
    EndThresholds,
    Floats,
    Rows,
    ScoredRows,
    SearchResult,
    check_search,
    exact_parts,
    exhaustive_scores,
)
from gradtrace.store.precision import norms_by_level, norms_of_levels
from gradtrace.store.rows import RowStore

_SEED_ROWS = 16  # rows beyond k, at either end, that are scored exactly first, to get thresholds
_BLOCKS_PER_SEED = 64  # seeds are the extremes of blocks of rows: so many blocks that two seeds rarely share one
_FINAL_ROWS = 16  # survivors beyond 2 k that are cheaper to score exactly than to bound further
_UNDERFLOW = 2.0**-100  # more than float32 underflow can hide in a sum of products with a query of norm about 1
_SMALLEST_NORM = 2.0**-80  # of a level of such a query, for bounds of rounding: smaller values lose digits in float32
_LARGEST_NORM = 2.0**110  # leaves room to add bounds up
_QUERIES_PER_PASS = 16  # that share a pass over the rows: a third of the time for each; more gain little

_SCAN_SHARE = 0.2  # of the rows, that must survive the first level to make a scan of all faster than reading them
_SCANNED_TOGETHER = 4  # queries in a pass, from which a scan of rows is so cheap that it need not be tried to prune
_FIRST_LEVEL_SHARE = 0.2  # of the products of norms that lies in the first level, below which pruning is not tried

Route = Literal["prune", "scan"]


@dataclass(frozen=True, slots=True)
class _Query:
    """A query as given, for exact scores, and scaled to a norm of about 1, for bounds that float32 can hold."""

    exact: Doubles  # [C, D]
    vectors: Tensor  # [C, D] float32, the query divided by a power of two
    norms: Floats  # [C, levels] of `vectors` in each level, rounded up
    checkpoints: list[int]
    row_scale: Floats | None  # [rows]
    rounding: Floats  # [C, levels]: the rounding error of a score is less than their products with the rows' norms


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Scores of all rows, as far as they are known after one pass over the rows. Without `row_scale`.

    scores: [rows]
    slack: [rows], how much they may be off, with rounding
    missing: [C, D], scores + <missing, row> are the true scores;  missing_norms: [C, levels], of each level
    first_missing: the first level in which `missing` counts
    """

    scores: Floats
    slack: Floats
    missing: Tensor
    missing_norms: Floats
    first_missing: int


@dataclass(slots=True)
class _Survivors:
    """Rows that may be among the k best or worst, and the bounds of their scores.

    rows: [m], ascending
    partial: [m], the part of each score that has been read
    slack: [C + 1, m], how much the unread columns of each checkpoint, and in the last line rounding, may change a score
    """

    rows: Rows
    partial: Floats
    slack: Floats

    def prune(self, thresholds: EndThresholds) -> None:
        total = self.slack.sum(axis=0)
        lower, upper = self.partial - total, self.partial + total
        thresholds.tighten(lower, upper)
        keep = np.flatnonzero(thresholds.within_reach(lower, upper))
        if len(keep) < len(self.rows):
            self.rows, self.partial = self.rows[keep], self.partial[keep]
            self.slack = self.slack.take(keep, axis=1)


@dataclass(slots=True)
class _Search:
    """The search for one query's ends. touched: rows of which more than the first level was read."""

    query: _Query
    estimate: _Estimate
    thresholds: EndThresholds
    survivors: _Survivors
    touched: int


class ProgressiveSearcher:
    """Searches a store. Holds the first level of all rows (on `device`) and the norms of their levels in memory.

    That is 4 bytes x checkpoints x (width of the first level + number of levels) for each row, as float32; half
    precision would double the time of a scan. A search adds 8 bytes a row and query, for up to 16 queries at a time.
    """

    def __init__(self, store: RowStore, device: str | torch.device = "cpu", route: Route | None = None) -> None:
        """route: how every query is searched, which changes no answer; None: chosen for each query."""
        self._store, self._route = store, route
        self._edges = [0, *store.levels]
        # Column by column: a product with a narrow matrix runs four times as fast over columns as over rows.
        first = torch.empty(store.checkpoints, store.levels[0], store.rows)
        norms = torch.empty(store.checkpoints, len(store.levels), store.rows)
        largest = torch.zeros(store.rows)
        for checkpoint in range(store.checkpoints):
            for start, values in store.first_levels(checkpoint):
                first[checkpoint, :, start : start + len(values)] = values.T
            for start, shard in store.shards(checkpoint):
                norms[checkpoint, :, start : start + shard.rows] = norms_of_levels(shard.tails).T
                rows = largest[start : start + shard.rows]
                torch.maximum(rows, shard.tails[:, 0], out=rows)
        self._first = first.to(device)  # [C, width, rows]
        self._norms = norms  # [C, levels, rows]
        self._mean_norms: Doubles = norms.double().mean(dim=2).nan_to_num_().numpy()  # [C, levels]
        self._largest_norms: Floats = largest.numpy()  # [rows], over the checkpoints
        # Twice the usual bound of float32 summation error, relative to the sum of the products of norms.
        terms = store.dimensions + 4 * (store.checkpoints + len(store.levels)) + 64
        self._summation_error = terms * 2.0**-23

    def search(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """See `RowSearcher.search`."""
        by_query = self.scored(queries, checkpoints, k, row_scale=row_scale, allowed=allowed)
        return [scored.result(k) for scored in by_query]

    def scores(self, queries: Tensor, checkpoints: Sequence[int], *, row_scale: Tensor | None = None) -> Floats:
        """See `RowSearcher.scores`."""
        return exhaustive_scores(self._store, queries, checkpoints, row_scale)

    def scored(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[ScoredRows]:
        """As `search`, with exact scores that can be merged with those of other rows."""
        check_search(queries, k)
        scale = None if row_scale is None else row_scale.cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            scaled_norms = self._largest_norms * (1 if scale is None else np.abs(scale))
        if not scaled_norms.max(initial=0) <= _LARGEST_NORM:  # NaN compares false
            raise QueryError("row_scale has values that are NaN, infinite or too large for float32 scores")
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        prepared = [self._prepare(query, list(checkpoints), scale) for query in queries.cpu()]
        results, scan_threads = [], torch.get_num_threads()
        with threads(1):
            for start in range(0, len(prepared), _QUERIES_PER_PASS):
                results += self._search(prepared[start : start + _QUERIES_PER_PASS], rows, k, scan_threads)
        return results

    def _prepare(self, query: Tensor, checkpoints: list[int], row_scale: Floats | None) -> _Query:
        vectors = (query.double() / 2.0 ** math.frexp(float(query.double().norm()))[1]).float()
        norms: Floats = norms_by_level(vectors, self._store.levels).numpy()
        error = self._summation_error + max(product_error(self._first.device), product_error("cpu"))
        rounding = np.maximum(norms, np.float32(_SMALLEST_NORM)) * np.float32(error)
        return _Query(query.double().numpy(), vectors, norms, checkpoints, row_scale, rounding)

    def _first_level(self, queries: Sequence[_Query]) -> list[_Estimate]:
        """The first level's part of all scores."""
        sums = torch.empty(len(queries), self._store.rows, device=self._first.device)
        for position, checkpoint in enumerate(queries[0].checkpoints):
            heads = torch.stack([query.vectors[position, : self._edges[1]] for query in queries]).to(sums.device)
            if len(queries) == 1:  # a product with a vector runs faster than with a matrix of one row
                sums[0].addmv_(self._first[checkpoint].T, heads[0], beta=min(position, 1))
            else:
                sums.addmm_(heads, self._first[checkpoint], beta=min(position, 1))
        vectors = torch.stack([query.vectors for query in queries])
        return self._with_slack(queries, sums.cpu(), vectors, np.stack([query.norms for query in queries]), 1)

    def _scan(self, queries: Sequence[_Query], scan_threads: int) -> list[_Estimate]:
        """All scores, but for what the queries lose when they are rounded to integers."""
        checkpoints = queries[0].checkpoints
        vectors = torch.stack([query.vectors for query in queries])
        rounded = round_queries(vectors, self._store.levels, self._store.column_scales(checkpoints))
        sums = scan(self._store, rounded, checkpoints, scan_threads)
        return self._with_slack(queries, sums, rounded.residuals, rounded.residual_norms.numpy(), 0)

    def _with_slack(
        self, queries: Sequence[_Query], scores: Tensor, missing: Tensor, norms: Floats, first: int
    ) -> list[_Estimate]:
        """Estimates of each query. scores: [q, rows];  the others as in `_Estimate`, with the queries in front."""
        checkpoints, used = queries[0].checkpoints, norms.copy()
        used[:, :, :first] = 0
        used += np.stack([query.rounding for query in queries])
        used *= np.float32(1 + self._summation_error + 2 * product_error("cpu"))  # must not be too small
        weights = torch.zeros(len(queries), *self._norms.shape[:2])
        weights.index_add_(1, torch.tensor(checkpoints), torch.from_numpy(used))  # a checkpoint may come twice
        slack = (weights.flatten(1) @ self._norms.flatten(0, 1)).add_(_UNDERFLOW)
        return [
            _Estimate(score, bound, vector, norm, first)
            for score, bound, vector, norm in zip(scores.numpy(), slack.numpy(), missing, norms, strict=True)
        ]

    def _search(self, queries: Sequence[_Query], rows: Rows, k: int, scan_threads: int) -> list[ScoredRows]:
        """Queries that share passes over the rows.  rows: [m], those that may be returned, ascending"""
        searches: dict[int, _Search] = {}
        most = self._store.rows * _SCAN_SHARE
        scanned = [number for number, query in enumerate(queries) if self._scans(query, len(queries), len(rows) > most)]
        pruned = [number for number in range(len(queries)) if number not in scanned]
        if pruned:
            estimates = self._first_level([queries[number] for number in pruned])
            for number, estimate in zip(pruned, estimates, strict=True):
                searches[number] = self._start(queries[number], estimate, rows, EndThresholds(k))
            if self._route is None and can_scan(self._store):
                scanned += [number for number in pruned if len(searches[number].survivors.rows) > most]
        if scanned:
            estimates = self._scan([queries[number] for number in scanned], scan_threads)
            for number, estimate in zip(scanned, estimates, strict=True):
                known = searches[number].thresholds if number in searches else EndThresholds(k)
                searches[number] = self._start(queries[number], estimate, rows, known)
        return [self._finish(searches[number], len(rows)) for number in range(len(queries))]

    def _scans(self, query: _Query, together: int, many: bool) -> bool:
        """Whether to scan without trying what the first level prunes.

        together: number of queries in a pass;  many: whether many of the rows may be returned
        """
        if not can_scan(self._store) or self._route is not None:
            return can_scan(self._store) and self._route == "scan"
        if not many:
            return False
        if query.row_scale is not None:  # scores of one size, whatever the norms by which rows are pruned
            return True
        first_share = self._mean_products(query, 1) / max(self._mean_products(query, len(self._store.levels)), 1e-30)
        return together >= _SCANNED_TOGETHER and first_share < _FIRST_LEVEL_SHARE

    def _mean_products(self, query: _Query, levels: int) -> float:
        """The sum over the first levels of the norms of the query and, in the mean, of the rows, multiplied."""
        return float((self._mean_norms[query.checkpoints, :levels] * query.norms[:, :levels]).sum())

    def _start(self, query: _Query, estimate: _Estimate, rows: Rows, thresholds: EndThresholds) -> _Search:
        """Which rows may be at either end, by the estimate."""
        partial, slack = scaled(estimate, query.row_scale)
        if len(rows) < len(partial):
            partial, slack = partial[rows], slack[rows]
        seeds = rows[:0]
        if len(rows) > enough(thresholds.k) and query.norms.any():
            seeds = extreme_positions(partial, thresholds.k + _SEED_ROWS)
            self._seed(thresholds, query, estimate, rows[seeds], partial[seeds], slack[seeds])
        reach = thresholds.within_reach(partial - slack, partial + slack)
        keep = np.flatnonzero(reach) if query.norms.any() else np.arange(min(thresholds.k, len(rows)))
        touched = len(keep) + int(np.count_nonzero(~reach[seeds])) if estimate.first_missing else len(rows)
        survivors = self._survivors(query, estimate, rows[keep], partial[keep])
        return _Search(query, estimate, thresholds, survivors, touched if query.norms.any() else 0)

    def _finish(self, search: _Search, searched: int) -> ScoredRows:
        query, survivors, k = search.query, search.survivors, search.thresholds.k
        if len(survivors.rows) > enough(k) and not search.estimate.first_missing:
            self._read_missing(query, search.estimate, survivors)
            survivors.prune(search.thresholds)
        levels_read = [search.estimate.first_missing] * len(query.checkpoints)
        while len(survivors.rows) > enough(k) and survivors.slack[:-1].any():
            self._read_next_level(query, search.estimate, survivors, levels_read)
            survivors.prune(search.thresholds)
        score_parts = exact_parts(self._store, query.exact, query.checkpoints, survivors.rows, query.row_scale)
        return ScoredRows(survivors.rows, score_parts, True, search.touched, searched)

    def _seed(
        self, thresholds: EndThresholds, query: _Query, estimate: _Estimate, rows: Rows, partial: Floats, slack: Floats
    ) -> None:
        """First thresholds, from rows [m] that look extreme: their bounds, or where these are wide, their scores."""
        if estimate.first_missing:
            partial, slack = self._full_scores(query, rows), self._rounding(query, rows)
        thresholds.tighten(partial - slack, partial + slack)

    def _survivors(self, query: _Query, estimate: _Estimate, rows: Rows, partial: Floats) -> _Survivors:
        places = range(len(query.checkpoints))
        unread = [self._unread_bounds(query, estimate, place, estimate.first_missing, rows) for place in places]
        return _Survivors(rows, partial, np.stack([*unread, self._rounding(query, rows)]))

    def _unread_bounds(self, query: _Query, estimate: _Estimate, place: int, level: int, rows: Rows) -> Floats:
        """Bounds of what misses from the scores, from `level` on, at the checkpoint at this place of the query. [m]"""
        norms = self._norms[query.checkpoints[place], level:].numpy()  # [levels, all rows]
        bounds: Floats = estimate.missing_norms[place, level:] @ norms.take(rows, axis=1)
        return bounds if query.row_scale is None else bounds * np.abs(query.row_scale[rows])

    def _rounding(self, query: _Query, rows: Rows) -> Floats:
        """Bounds of the rounding errors of float32 scores. [m]"""
        bounds: Floats = np.full(len(rows), _UNDERFLOW, dtype=np.float32)
        for checkpoint, of_query in zip(query.checkpoints, query.rounding, strict=True):
            bounds += of_query @ self._norms[checkpoint].numpy().take(rows, axis=1)
        return bounds if query.row_scale is None else bounds * np.abs(query.row_scale[rows]) + np.float32(_UNDERFLOW)

    def _full_scores(self, query: _Query, rows: Rows) -> Floats:
        """[m] float32, right within the bounds of rounding."""
        scores: Floats = self._store.inner_products(query.checkpoints, rows, query.vectors).numpy()
        return scores if query.row_scale is None else scores * query.row_scale[rows]

    def _read_missing(self, query: _Query, estimate: _Estimate, survivors: _Survivors) -> None:
        """All that misses at once: after a scan, survivors are few, and no level has much more of it than others."""
        rows = survivors.rows
        products = self._store.inner_products(query.checkpoints, rows, estimate.missing).numpy()
        survivors.partial += products if query.row_scale is None else products * query.row_scale[rows]
        survivors.slack[:-1] = 0

    def _read_next_level(
        self, query: _Query, estimate: _Estimate, survivors: _Survivors, levels_read: list[int]
    ) -> None:
        """Read the next level at the checkpoint where unread columns leave the most slack per column."""
        widths = [self._edges[min(level + 1, len(self._edges) - 1)] - self._edges[level] for level in levels_read]
        place = int(np.argmax(survivors.slack[:-1].sum(axis=1) / np.maximum(widths, 1)))
        level, rows = levels_read[place], survivors.rows
        columns = estimate.missing[place, self._edges[level] : self._edges[level + 1]]
        products = self._store.products(query.checkpoints[place], torch.from_numpy(rows), level, columns).numpy()
        survivors.partial += products if query.row_scale is None else products * query.row_scale[rows]
        survivors.slack[place] = self._unread_bounds(query, estimate, place, level + 1, rows)
        levels_read[place] += 1


def enough(k: int) -> int:
    """So few survivors are scored exactly without further bounds."""
    return 2 * k + _FINAL_ROWS


def scaled(estimate: _Estimate, row_scale: Floats | None) -> tuple[Floats, Floats]:
    """Scores and slack, times the rows' scales."""
    if row_scale is None:
        return estimate.scores, estimate.slack
    return estimate.scores * row_scale, estimate.slack * np.abs(row_scale) + np.float32(_UNDERFLOW)


def extreme_positions(values: Floats, count: int) -> Rows:
    """Positions of `count` high and as many low values, ascending; all positions where there are fewer values.

    Not the `count` most extreme ones: only the maximum and the minimum of each block of values compete, since a full
    selection would take longer than the scan.
    """
    if len(values) <= 2 * count:
        return np.arange(len(values))
    width = max(1, len(values) // (_BLOCKS_PER_SEED * count))
    blocks = torch.from_numpy(values)[: len(values) // width * width].view(-1, width)
    high = blocks.amax(1).topk(count).indices
    low = blocks.amin(1).topk(count, largest=False).indices
    positions = torch.cat([high * width + blocks[high].argmax(1), low * width + blocks[low].argmin(1)])
    return np.unique(positions.numpy())
