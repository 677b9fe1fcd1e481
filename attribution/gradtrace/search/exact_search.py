"""Exact search at both ends: which rows have the highest and which the lowest scores.

score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>

The first level (the first columns) of every row is scanned in memory. The rest of a score is bounded by Cauchy-Schwarz,
|<query tail, row tail>| <= |query tail| |row tail|, with the stored norms of the rows' tails. A row whose bounds reach
neither the k best nor the k worst scores known so far is dropped. The next levels are read for the remaining rows only,
first at the checkpoint whose unread columns leave the widest bounds. Where the bounds prune no row, all levels of all
rows are read in order, and the answer is just as exact.
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
from gradtrace.search.scored_rows import Doubles, EndThresholds, Floats, Rows, SearchResult, check_search, rank
from gradtrace.store.precision import tail_norms
from gradtrace.store.rows import RowStore

_SEED_ROWS = 16  # rows beyond k, at either end, that are scored exactly first, to get thresholds
_BLOCKS_PER_SEED = 64  # seeds are the extremes of blocks of rows: so many blocks that two seeds rarely share one
_FINAL_ROWS = 16  # survivors beyond 2 k that are cheaper to score exactly than to bound further
_UNDERFLOW = 2.0**-100  # more than float32 underflow can hide in a sum of products with a query of norm about 1
_LARGEST_NORM = 2.0**110  # leaves room to add bounds up
_QUERIES_PER_PASS = 16  # that share a pass over the first level: a third of the time for each; more gain little

# Errors of matrix products by PyTorch's names of precisions. An operand that is truncated to 10 bits errs by up to
# 2^-10, relatively: two operands by twice as much, and the .1 covers the product of both errors. "none": not set.
_PRODUCT_ERRORS = {"ieee": 0.0, "highest": 0.0, "none": 0.0, "tf32": 2.1 * 2.0**-10, "high": 2.1 * 2.0**-10}
_LARGEST_PRODUCT_ERROR = 2.1 * 2.0**-7  # bfloat16: "bf16", "medium"


def product_error(device: str | torch.device) -> float:
    """A bound of the error that rounded operands add to a matrix product, relative to the sum of the absolute values of
    its terms. 0 in full float32.

    It follows the current `torch.set_float32_matmul_precision` and `torch.backends.*.matmul.fp32_precision`, which a
    task's file may set for its training in the same process.
    """
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    try:
        precision = backend.matmul.fp32_precision
    except (AttributeError, AssertionError):  # PyTorch before 2.9
        precision = torch.get_float32_matmul_precision()
    return _PRODUCT_ERRORS.get(precision, _LARGEST_PRODUCT_ERROR)


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


@dataclass(frozen=True, slots=True)
class _Query:
    """A query as given, for exact scores, and scaled to a norm of about 1, for bounds that float32 can hold."""

    exact: Doubles  # [C, D]
    vectors: Tensor  # [C, D] float32, the query divided by a power of two
    tails: Floats  # [C, levels + 1] norms of the columns from each level on, zero after the last
    checkpoints: list[int]
    row_scale: Floats | None  # [rows]
    error: float  # of float32 products, relative to the product of the norms


class ProgressiveSearcher:
    """Searches a store. Holds the first level of all rows (on `device`) and the norms of their tails in memory.

    That is 4 bytes x checkpoints x (width of the first level + number of levels + 1) for each row, as float32; half
    precision would double the time of a scan. A search adds 4 bytes a row and query, for up to 16 queries at a time.
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
            queries: [q, C, D] float32, C = len(checkpoints), already multiplied by the checkpoints' weights.
            checkpoints: positions in the manifest.
            row_scale: [rows] float32, a factor of each row's score; None: 1.
            allowed: bool [rows], which rows may be returned; None: all.

        Raises:
            QueryError: a query or a scale is not finite, or k < 1.
        """
        check_search(queries, k)
        scale = None if row_scale is None else row_scale.cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            scaled_norms = self._largest_norms * (1 if scale is None else np.abs(scale))
        if not scaled_norms.max(initial=0) <= _LARGEST_NORM:  # NaN compares false
            raise QueryError("row_scale has values that are NaN, infinite or too large for float32 scores")
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        prepared = [self._prepare(query, list(checkpoints), scale) for query in queries.cpu()]
        results = []
        with threads(1):
            for start in range(0, len(prepared), _QUERIES_PER_PASS):
                group = prepared[start : start + _QUERIES_PER_PASS]
                for query, sums in zip(group, self._first_level(group), strict=True):
                    results.append(self._search(query, sums, rows, k))
        return results

    def _prepare(self, query: Tensor, checkpoints: list[int], row_scale: Floats | None) -> _Query:
        vectors = (query.double() / 2.0 ** math.frexp(float(query.double().norm()))[1]).float()
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
        """sums: [all rows], the first level's part of all scores;  rows: [m], those that may be returned, ascending."""
        enough = 2 * k + _FINAL_ROWS
        if not query.tails.any():  # every score is zero, and the lowest rows win at both ends
            ends = rank(self._store, query.exact, query.checkpoints, rows[:k], k)
            return SearchResult(*ends, exact=True, rows_touched=0, rows_searched=len(rows))
        bounds = self._first_bounds(query, sums)
        partial, slack, rounding = (values if len(values) == len(rows) else values[rows] for values in bounds)
        thresholds, seeds = EndThresholds(k), rows[:0]
        if len(rows) > enough:
            seeds = extreme_positions(partial, k + _SEED_ROWS)
            scores = self._full_scores(query, rows[seeds])
            thresholds.tighten(scores - rounding[seeds], scores + rounding[seeds])
        reach = thresholds.within_reach(partial - slack, partial + slack)
        keep = np.flatnonzero(reach)
        touched = len(keep) + int(np.count_nonzero(~reach[seeds]))
        unread = (self._unread_bounds(query, place, 1, rows[keep]) for place in range(len(query.checkpoints)))
        survivors = _Survivors(rows[keep], partial[keep], np.stack([*unread, rounding[keep]]))
        levels_read = [1] * len(query.checkpoints)
        while len(survivors.rows) > enough and survivors.slack[:-1].any():
            self._read_next_level(query, survivors, levels_read)
            survivors.prune(thresholds)
        ends = rank(self._store, query.exact, query.checkpoints, survivors.rows, k, query.row_scale)
        return SearchResult(*ends, exact=True, rows_touched=touched, rows_searched=len(rows))

    def _first_bounds(self, query: _Query, sums: Tensor) -> tuple[Floats, Floats, Floats]:
        """After the first level: partial scores, bounds of what is missing of them, bounds of rounding. Each [rows]."""
        partial: Floats = sums.numpy()
        rounding = self._tail_products(query, 0) * np.float32(query.error) + np.float32(_UNDERFLOW)
        slack = self._tail_products(query, 1) + rounding
        if query.row_scale is not None:
            partial, scale = partial * query.row_scale, np.abs(query.row_scale)
            slack, rounding = slack * scale + np.float32(_UNDERFLOW), rounding * scale + np.float32(_UNDERFLOW)
        return partial, slack, rounding

    def _tail_products(self, query: _Query, level: int) -> Floats:
        """Sum over checkpoints of |query from level on| |row from level on|. [rows]."""
        weights = np.zeros(self._store.checkpoints, dtype=np.float32)
        np.add.at(weights, query.checkpoints, query.tails[:, level])
        weights *= np.float32(1 + 2 * product_error("cpu"))  # the sum is a product as well, and must not be too small
        sums: Floats = torch.mv(torch.from_numpy(self._tails[:, level]).T, torch.from_numpy(weights)).numpy()
        return sums

    def _unread_bounds(self, query: _Query, place: int, level: int, rows: Rows) -> Floats:
        """Bounds of the scores' part from `level` on, at the checkpoint at this place of the query. [m]."""
        bounds: Floats = self._tails[query.checkpoints[place], level][rows] * query.tails[place, level]
        return bounds if query.row_scale is None else bounds * np.abs(query.row_scale[rows])

    def _full_scores(self, query: _Query, rows: Rows) -> Floats:
        """[m] float32, right within the bounds of rounding."""
        values = self._store.gather(query.checkpoints, rows).flatten(1)  # [m, C * D]
        scores: Floats = torch.mv(values, query.vectors.flatten()).numpy()
        return scores if query.row_scale is None else scores * query.row_scale[rows]

    def _read_next_level(self, query: _Query, survivors: _Survivors, levels_read: list[int]) -> None:
        """Read the next level at the checkpoint where unread columns leave the most slack per column."""
        widths = [self._edges[min(level + 1, len(self._edges) - 1)] - self._edges[level] for level in levels_read]
        place = int(np.argmax(survivors.slack[:-1].sum(axis=1) / np.maximum(widths, 1)))
        level, rows = levels_read[place], survivors.rows
        columns = query.vectors[place, self._edges[level] : self._edges[level + 1]]
        products = self._store.products(query.checkpoints[place], torch.from_numpy(rows), level, columns).numpy()
        survivors.partial += products if query.row_scale is None else products * query.row_scale[rows]
        survivors.slack[place] = self._unread_bounds(query, place, level + 1, rows)
        levels_read[place] += 1


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
