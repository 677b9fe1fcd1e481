"""Exact search at both ends: which rows have the highest and which the lowest scores.

score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>

The first level of every row is scanned in memory. What is left of a score is bounded by Cauchy-Schwarz,
|<query tail, row tail>| <= |query tail| |row tail|, from stored tail norms. A row whose bounds reach neither the k best
nor the k worst scores known so far is dropped; of the others the next levels are read, the checkpoint that leaves most
open first. Where the bounds do not prune, all levels of all rows are read in order, and the answer is as exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.errors import QueryError
from gradtrace.product_precision import product_error
from gradtrace.store.precision import tail_norms
from gradtrace.store.rows import RowStore

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]

_SEEDS = 16  # rows scored in full at either end, beyond k, to learn where the ends lie
_STRETCHES = 64  # for each of these rows, so that hardly two of them meet in one
_FEW = 16  # survivors beyond 2 k that are cheaper to score in full than to bound further
_TINY = 2.0**-100  # more than float32 underflow can hide in a sum of products with a query of norm about one
_LARGEST = 2.0**110  # leaves room to add bounds up
_BLOCK_VALUES = 1 << 23  # float32 values that reads of whole rows hold at a time
_TOGETHER = 16  # queries that share a pass over the first level: a third of the time for each; more gain little


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Both ends of one query's ranking, most extreme first; of equal scores the lower row id comes first.

    rows: int64 [<= k];  scores: float32 [<= k];  parts: float32 [<= k, checkpoints], summing to the scores
    """

    top_rows: Rows
    top_scores: Floats
    top_parts: Floats
    bottom_rows: Rows
    bottom_scores: Floats
    bottom_parts: Floats
    exact: bool
    rows_touched: int  # rows of which more than the first level was read
    rows_searched: int


@dataclass(slots=True)
class _Ends:
    """The k-th best score is at least `top`, the k-th worst at most `bottom`."""

    k: int
    top: float = -math.inf
    bottom: float = math.inf

    def learn(self, lower: Floats, upper: Floats) -> None:
        """Move inwards by the bounds of some rows' scores."""
        if len(lower) >= self.k:
            self.top = max(self.top, float(np.partition(lower, -self.k)[-self.k]))
            self.bottom = min(self.bottom, float(np.partition(upper, self.k - 1)[self.k - 1]))

    def within_reach(self, lower: Floats, upper: Floats) -> NDArray[np.bool_]:
        """Which rows may be at either end."""
        return (upper >= self.top) | (lower <= self.bottom)


@dataclass(slots=True)
class _Survivors:
    """Rows that may be among the k best or worst, and what is known of their scores."""

    rows: Rows  # [m], ascending
    partial: Floats  # [m] the scores as far as read
    open: Floats  # [C + 1, m] bounds of what each checkpoint's unread columns, and at last rounding, may add or take

    def prune(self, ends: _Ends) -> None:
        slack = self.open.sum(axis=0)
        lower, upper = self.partial - slack, self.partial + slack
        ends.learn(lower, upper)
        keep = np.flatnonzero(ends.within_reach(lower, upper))
        if len(keep) < len(self.rows):
            self.rows, self.partial = self.rows[keep], self.partial[keep]
            self.open = self.open.take(keep, axis=1)


@dataclass(frozen=True, slots=True)
class _Query:
    """One query: as it came, for the scores, and at a norm of about one, for bounds that float32 can hold."""

    exact: Doubles  # [C, D]
    vectors: Tensor  # [C, D] float32, the query divided by a power of two
    tails: Floats  # [C, levels + 1] norms of what is left from each level on, zero after the last
    checkpoints: list[int]
    row_scale: Floats | None
    error: float  # of float32 products, relative to the product of the norms


class ProgressiveSearcher:
    """Searches a store. Holds the first level of all rows (on `device`) and their tail norms in memory.

    That is 4 bytes x checkpoints x (width of the first level + number of levels + 1) for each row, as float32: half the
    width would take twice the time to scan. A search adds 4 bytes a row and query, for up to 16 queries at a time.
    """

    def __init__(self, store: RowStore, device: str | torch.device = "cpu") -> None:
        self._store = store
        self._edges = [0, *store.levels]
        levels = len(store.levels)
        # Column by column: a product with a narrow matrix runs four times as fast over columns as over rows.
        first = torch.empty(store.checkpoints, store.levels[0], store.rows)
        tails = torch.zeros(store.checkpoints, levels + 1, store.rows)
        for checkpoint in range(store.checkpoints):
            for start, values in store.first_levels(checkpoint):
                first[checkpoint, :, start : start + len(values)] = values.T
            for start, shard in store.shards(checkpoint):
                tails[checkpoint, :levels, start : start + shard.layout.rows] = shard.tails.T
        self._first = first.to(device)  # [C, width, rows]
        self._tails: Floats = tails.numpy()  # [C, levels + 1, rows], zero after the last level
        self._largest_norms: Floats = self._tails[:, 0].max(axis=0, initial=0)  # [rows], over the checkpoints
        # Twice the usual bound of float32 summation error, relative to the product of the norms.
        self._summation_error = (store.dimensions + store.checkpoints + 64) * 2.0**-23

    def search(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """The k highest- and the k lowest-scoring rows for each query.

        Args:
            queries: [q, C, D] float32, C = len(checkpoints); the checkpoints' weights are already in them.
            checkpoints: positions in the manifest.
            row_scale: [rows] float32 factor of each row's score; None: one.
            allowed: [rows] which rows may be found; None: all.

        Raises:
            QueryError: a query or a scale is not finite, or k < 1.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        scale = None if row_scale is None else row_scale.cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = self._largest_norms * (1 if scale is None else np.abs(scale))
        if not scaled.max(initial=0) <= _LARGEST:  # NaN compares false
            raise QueryError("row_scale has values that are NaN, infinite or too large for float32 scores")
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        prepared = [self._prepare(query, list(checkpoints), scale) for query in queries.cpu()]
        results = []
        with threads(1):
            for start in range(0, len(prepared), _TOGETHER):
                some = prepared[start : start + _TOGETHER]
                for query, sums in zip(some, self._first_level(some), strict=True):
                    results.append(self._search(query, sums, rows, k))
        return results

    def _prepare(self, query: Tensor, checkpoints: list[int], row_scale: Floats | None) -> _Query:
        norm = float(query.double().norm())
        if not math.isfinite(norm):
            raise QueryError("the query's gradient has coordinates that are NaN or infinite")
        vectors = (query.double() / 2.0 ** math.frexp(norm)[1]).float()
        tails = torch.nn.functional.pad(tail_norms(vectors, self._store.levels), (0, 1))
        error = self._summation_error + max(product_error(self._first.device), product_error("cpu"))
        return _Query(query.double().numpy(), vectors, tails.numpy(), checkpoints, row_scale, error)

    def _first_level(self, queries: Sequence[_Query]) -> Tensor:
        """The first level's part of all scores, [queries, rows]: one pass over memory for all queries."""
        sums = torch.empty(len(queries), self._store.rows, device=self._first.device)
        for position, checkpoint in enumerate(queries[0].checkpoints):
            heads = torch.stack([query.vectors[position, : self._edges[1]] for query in queries]).to(sums.device)
            if len(queries) == 1:  # a product with a vector runs faster than with a matrix of one row
                sums[0].addmv_(self._first[checkpoint].T, heads[0], beta=min(position, 1))
            else:
                sums.addmm_(heads, self._first[checkpoint], beta=min(position, 1))
        return sums.cpu()

    def _search(self, query: _Query, sums: Tensor, rows: Rows, k: int) -> SearchResult:
        """`sums`: the first level's part of all scores;  `rows`: the rows that may be found, ascending."""
        few = 2 * k + _FEW
        if not query.tails.any():  # every score is zero, and the lowest ids win at both ends
            return self._rank(query, rows[:k], k, 0, len(rows))
        partial, slack, rounding = (part if len(part) == len(rows) else part[rows] for part in self._scan(query, sums))
        ends, seeds = _Ends(k), rows[:0]
        if len(rows) > few:
            seeds = _extremes(partial, k + _SEEDS)
            scores = self._full_scores(query, rows[seeds])
            ends.learn(scores - rounding[seeds], scores + rounding[seeds])
        reach = ends.within_reach(partial - slack, partial + slack)
        keep = np.flatnonzero(reach)
        touched = len(keep) + int(np.count_nonzero(~reach[seeds]))
        survivors = self._survivors(query, rows[keep], partial[keep], rounding[keep])
        depths = [1] * len(query.checkpoints)
        while len(survivors.rows) > few and survivors.open[:-1].any():
            self._read_more(query, survivors, depths)
            survivors.prune(ends)
        return self._rank(query, survivors.rows, k, touched, len(rows))

    def _scan(self, query: _Query, sums: Tensor) -> tuple[Floats, Floats, Floats]:
        """What the first level says: scores so far, bounds of the rest, bounds of rounding. Each [rows]."""
        partial: Floats = sums.numpy()
        rounding = self._weighted_tails(query, 0) * np.float32(query.error) + np.float32(_TINY)
        slack = self._weighted_tails(query, 1) + rounding
        if query.row_scale is not None:
            partial, gains = partial * query.row_scale, np.abs(query.row_scale)
            slack, rounding = slack * gains + np.float32(_TINY), rounding * gains + np.float32(_TINY)
        return partial, slack, rounding

    def _weighted_tails(self, query: _Query, level: int) -> Floats:
        """Sum over checkpoints of |query from level on| |row from level on|. [rows]."""
        weights = np.zeros(self._store.checkpoints, dtype=np.float32)
        np.add.at(weights, query.checkpoints, query.tails[:, level])
        weights *= np.float32(1 + 2 * product_error("cpu"))  # the sum is a product as well, and must not be too small
        sums: Floats = torch.mv(torch.from_numpy(self._tails[:, level]).T, torch.from_numpy(weights)).numpy()
        return sums

    def _survivors(self, query: _Query, rows: Rows, partial: Floats, rounding: Floats) -> _Survivors:
        places = range(len(query.checkpoints))
        return _Survivors(rows, partial, np.stack([*(self._left(query, place, 1, rows) for place in places), rounding]))

    def _left(self, query: _Query, place: int, level: int, rows: Rows) -> Floats:
        """Bounds of what the columns from `level` on of the checkpoint at this place of the query may add. [m]."""
        left: Floats = self._tails[query.checkpoints[place], level][rows] * query.tails[place, level]
        return left if query.row_scale is None else left * np.abs(query.row_scale[rows])

    def _full_scores(self, query: _Query, rows: Rows) -> Floats:
        """[m] float32, within the bounds of rounding."""
        scores: Floats = torch.mv(
            self._store.gather(query.checkpoints, rows).flatten(1), query.vectors.flatten()
        ).numpy()
        return scores if query.row_scale is None else scores * query.row_scale[rows]

    def _read_more(self, query: _Query, survivors: _Survivors, depths: list[int]) -> None:
        """Read the next level of the checkpoint whose unread columns leave most open per column."""
        widths = [self._edges[min(depth + 1, len(self._edges) - 1)] - self._edges[depth] for depth in depths]
        place = int(np.argmax(survivors.open[:-1].sum(axis=1) / np.maximum(widths, 1)))
        depth, rows = depths[place], survivors.rows
        part = query.vectors[place, self._edges[depth] : self._edges[depth + 1]]
        products = self._store.products(query.checkpoints[place], torch.from_numpy(rows), depth, part).numpy()
        survivors.partial += products if query.row_scale is None else products * query.row_scale[rows]
        survivors.open[place] = self._left(query, place, depth + 1, rows)
        depths[place] += 1

    def _rank(self, query: _Query, rows: Rows, k: int, touched: int, searched: int) -> SearchResult:
        return rank(
            self._store,
            query.exact,
            query.checkpoints,
            rows,
            k,
            row_scale=query.row_scale,
            exact=True,
            touched=touched,
            searched=searched,
        )


def rank(
    store: RowStore,
    query: Doubles,
    checkpoints: Sequence[int],
    rows: Rows,
    k: int,
    *,
    row_scale: Floats | None = None,
    exact: bool,
    touched: int,
    searched: int,
) -> SearchResult:
    """Score some rows in float64 and take both ends of them.

    query: [C, D];  rows: [m], ascending
    """
    chunk = max(1, _BLOCK_VALUES // (store.dimensions * len(checkpoints)))
    starts = range(0, len(rows), chunk)
    pieces = [_exact_parts(store, query, checkpoints, rows[start : start + chunk]) for start in starts]
    parts = np.concatenate(pieces) if pieces else np.zeros((0, len(checkpoints)))
    if row_scale is not None:
        parts *= row_scale[rows].astype(np.float64)[:, None]
    return both_ends(rows, parts, k, exact=exact, touched=touched, searched=searched)


def both_ends(rows: Rows, parts: Doubles, k: int, *, exact: bool, touched: int, searched: int) -> SearchResult:
    """The k best and the k worst of scored rows.

    rows: [m], ascending, so that a stable sort puts the lower of two equals first
    parts: [m, C], summing to the scores
    """
    scores = parts.sum(axis=1)
    top, bottom = np.argsort(-scores, kind="stable")[:k], np.argsort(scores, kind="stable")[:k]
    return SearchResult(
        top_rows=rows[top],
        top_scores=scores[top].astype(np.float32),
        top_parts=parts[top].astype(np.float32),
        bottom_rows=rows[bottom],
        bottom_scores=scores[bottom].astype(np.float32),
        bottom_parts=parts[bottom].astype(np.float32),
        exact=exact,
        rows_touched=touched,
        rows_searched=searched,
    )


def ends_of_scored(parts: Doubles, k: int, allowed: NDArray[np.bool_] | None) -> SearchResult:
    """The k best and the k worst of all rows, scored already. parts: [rows, C], summing to the scores.

    Raises:
        QueryError: k < 1.
    """
    if k < 1:
        raise QueryError(f"k must be at least 1, not {k}")
    rows = np.arange(len(parts)) if allowed is None else np.flatnonzero(allowed)
    scores, ends = parts[rows].sum(axis=1), _Ends(k)
    ends.learn(scores, scores)
    near = rows[ends.within_reach(scores, scores)]  # sorting these alone is faster
    return both_ends(near, parts[near], k, exact=True, touched=len(rows), searched=len(rows))


def _exact_parts(store: RowStore, query: Doubles, checkpoints: Sequence[int], rows: Rows) -> Doubles:
    """Each checkpoint's inner product, [m, C] float64. Sums row by row, so that equal rows get equal scores."""
    values = store.gather(checkpoints, rows).numpy().astype(np.float64)  # [m, C, D]
    values *= query
    parts: Doubles = values.sum(axis=2)
    return parts


def _extremes(values: Floats, count: int) -> Rows:
    """Positions of `count` high and as many low values, ascending; of all where there are fewer.

    Of many values, the best of each stretch compete alone: a whole selection would take longer than the scan.
    """
    if len(values) <= 2 * count:
        return np.arange(len(values))
    width = max(1, len(values) // (_STRETCHES * count))
    stretches = torch.from_numpy(values)[: len(values) // width * width].view(-1, width)
    high = stretches.amax(1).topk(count).indices
    low = stretches.amin(1).topk(count, largest=False).indices
    both = torch.cat([high * width + stretches[high].argmax(1), low * width + stretches[low].argmin(1)])
    return np.unique(both.numpy())


def exhaustive_scores(
    store: RowStore, queries: Tensor, checkpoints: Sequence[int], row_scale: Tensor | None = None
) -> Floats:
    """Every row's score for every query, [q, rows] float32. Reads all rows in blocks, so memory stays bounded.

    queries: [q, C, D] float32, C = len(checkpoints);  row_scale: [rows] float32
    """
    flat = queries.cpu().flatten(1)  # [q, C * D]
    scores = torch.empty(len(queries), store.rows)
    block_rows = max(1, _BLOCK_VALUES // (store.dimensions * max(1, len(checkpoints))))
    for start, block in store.blocks(checkpoints, block_rows):
        scores[:, start : start + len(block)] = flat @ block.flatten(1).T
    if row_scale is not None:
        scores *= row_scale.cpu()
    result: Floats = scores.numpy()
    return result
