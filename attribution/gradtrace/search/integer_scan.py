"""A scan of all rows in integers: estimates of all scores, and how far off each may be.

Of a query q, the columns of each level are rounded to int8 codes n with one step s: q = s n + e. The product of the
codes of a row with n is an exact integer, and

    <q, row> = s * scale of the row * <n, codes of the row> + <e, row>,     |<e, row>| <= |e| |row|

with the stored norms of the row's levels. int8 products run at the speed of memory. int4 codes c are unpacked to int8
first; there <n, c> stands for the product of the row with n / column scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradtrace.search.integer_product import LARGEST_CODE, MOST_COLUMNS, integer_product, is_usable
from gradtrace.store.precision import rounded_up, unpack
from gradtrace.store.rows import RowStore
from gradtrace.store.shards import Shard

_SMALLEST_STEP = 2.0**-100  # of queries with a norm of about 1; products with what is smaller cannot be told from 0
_BLOCK_ROWS = 1024  # that are multiplied at a time: at 1,024 columns, 1 MB of codes, which stay in the cache
_SINGLE_BLOCK_ROWS = 1 << 15  # for one query, whose product reads every code once
_ROWS_PER_THREAD = 8192  # with fewer, a further thread costs more than it gains


@dataclass(frozen=True, slots=True)
class RoundedQueries:
    """Queries [n, C, D] rounded to integers.

    codes: at each checkpoint and level int8 [width, n];  steps: float32 [C, levels, n]
    residuals: [n, C, D] float32, what rounding has taken away
    residual_norms: [n, C, levels] float32, of the residuals in each level, rounded up
    """

    codes: list[list[Tensor]]
    steps: Tensor
    residuals: Tensor
    residual_norms: Tensor


def round_queries(queries: Tensor, levels: Sequence[int], column_scales: Tensor | None) -> RoundedQueries:
    """queries: float32 [n, C, D] of norms about 1;  column_scales: [C, D], of the rows at these checkpoints."""
    exact = queries.double()
    scaled = exact if column_scales is None else exact * column_scales.double()
    codes, steps, rounded = [], [], []
    for start, stop in pairwise([0, *levels]):
        columns = scaled[:, :, start:stop]
        step = (columns.abs().amax(dim=2) / LARGEST_CODE).clamp_min_(_SMALLEST_STEP).float()  # [n, C]
        integers = (columns / step.double()[..., None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        codes.append(integers.to(torch.int8))
        steps.append(step.T)
        rounded.append(integers * step.double()[..., None])
    restored = torch.cat(rounded, dim=2)
    residuals = exact - (restored if column_scales is None else restored / column_scales.double())
    norms = [columns.norm(dim=2) for columns in residuals.split([code.shape[2] for code in codes], dim=2)]
    by_checkpoint = [[code[:, position].T for code in codes] for position in range(queries.shape[1])]
    residual_norms = rounded_up(torch.stack(norms, dim=2))
    return RoundedQueries(by_checkpoint, torch.stack(steps, dim=1), residuals.float(), residual_norms)


def can_scan(store: RowStore) -> bool:
    """Whether the store's rows are integers, and products of integers are exact and fast here."""
    width = max(stop - start for start, stop in pairwise([0, *store.levels]))
    return store.precision in ("int8", "int4") and width <= MOST_COLUMNS and is_usable()


def scan(store: RowStore, queries: RoundedQueries, checkpoints: Sequence[int], threads: int) -> Tensor:
    """Estimates of the scores of all rows, [n, rows] float32. Uses up to `threads` threads.

    Beside what the residuals are off, they are off by the rounding of float32: relative to the sum over checkpoints and
    levels of the norms of query and row multiplied, by less than (levels + checkpoints + 8) 2^-22.
    """
    count = queries.steps.shape[2]
    estimates = torch.empty(store.rows, count)
    size = _SINGLE_BLOCK_ROWS if count == 1 else _BLOCK_ROWS
    store.expect_scan(checkpoints, True)
    try:
        shards = [list(store.shards(checkpoint)) for checkpoint in checkpoints]
        # The shards of every checkpoint hold the same stretches of rows.
        for number, (start, shard) in enumerate(shards[0] if shards else []):
            stretch = [of_checkpoint[number][1] for of_checkpoint in shards]
            scanned = _Stretch(store, stretch, queries, checkpoints, estimates[start : start + shard.layout.rows])
            scanned.scan(size, threads)
    finally:
        store.expect_scan(checkpoints, False)
    return estimates.T


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive rows, with their shard at each of the checkpoints, and where their estimates go."""

    store: RowStore
    shards: list[Shard]
    queries: RoundedQueries
    checkpoints: Sequence[int]
    estimates: Tensor  # [rows of the stretch, n]

    def scan(self, block_rows: int, threads: int) -> None:
        rows = len(self.estimates)
        workers = max(1, min(threads, rows // _ROWS_PER_THREAD))
        edges = [rows * worker // workers for worker in range(workers + 1)]
        if workers == 1:
            self._scan(0, rows, block_rows)
            return
        with ThreadPoolExecutor(workers, initializer=torch.get_num_threads) as pool:
            list(pool.map(lambda edge: self._scan(edge[0], edge[1], block_rows), pairwise(edges)))

    def _scan(self, start: int, stop: int, block_rows: int) -> None:
        """Estimates of rows [start, stop) of the stretch."""
        block_rows = min(block_rows, stop - start)
        levels, count = len(self.store.levels), self.estimates.shape[1]
        products = torch.empty(levels, block_rows, count, dtype=torch.int32)
        buffers = [torch.empty(block_rows, len(codes), dtype=torch.int8) for codes in self.queries.codes[0]]
        for low in range(start, stop, block_rows):
            block = slice(low, min(low + block_rows, stop))
            size = block.stop - block.start
            sums = self.estimates[block].zero_()
            for position, shard in enumerate(self.shards):
                for level, codes in enumerate(self.queries.codes[position]):
                    rows = self._codes(shard, level, block, buffers[level][:size])
                    integer_product(rows, codes, products[level, :size])
                parts = products[:, :size].float().mul_(self.queries.steps[position, :, None])  # [levels, b, n]
                sums.addcmul_(parts.sum(dim=0), shard.scales[block, None])

    def _codes(self, shard: Shard, level: int, rows: slice, buffer: Tensor) -> Tensor:
        """int8 [b, width]: for several queries in a buffer, since the product with a matrix reads each code twice and
        not in order."""
        stored = shard.levels[level][rows]
        if self.store.precision == "int4":
            return buffer.copy_(unpack(stored, buffer.shape[1]))
        return stored if self.estimates.shape[1] == 1 else buffer.copy_(stored)
