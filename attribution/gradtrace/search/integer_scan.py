"""A scan of all rows in integers: estimates of all scores, and how far off each may be.

Of a query q, the columns of each level are rounded to int8 codes n with one step s: q = s n + e. The product of the
codes of a row with n is an exact integer, and

    <q, row> = s * scale of the row * <n, codes of the row> + <e, row>,     |<e, row>| <= |e| |row|

with the stored norms of the row's levels. int8 products run at the speed of memory.

Of int4 rows, q is multiplied by the column scales first. Codes c are not unpacked: a byte p has (c1 + 8) + 16 (c2 + 8),
so that p - 128 = 16 c2 + c1 + 8, as int8, and p mod 16 = c1 + 8. For coefficients x of c2 and y of c1,

    x c2 + y c1 = x / 16 (16 c2 + c1) + (y - x / 16) c1

is the sum of two products with half as many columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.search.integer_product import LARGEST_CODE, MOST_COLUMNS, integer_product, is_usable
from gradtrace.store.precision import level_widths, rounded_up
from gradtrace.store.rows import RowStore
from gradtrace.store.shards import Shard

_SMALLEST_STEP = 2.0**-100  # of queries with a norm of about 1; products with what is smaller cannot be told from 0
_PIECE_BYTES = 1 << 22  # that are multiplied at a time: the buffers of unpacked rows stay in the processor's cache
_BLOCK_PRODUCTS = 1 << 18  # of one level that are held at a time
_ROWS_PER_THREAD = 8192  # with fewer, a further thread costs more than it gains
_LIMBS_OF_A_FLOAT = 3  # of 8 bits: they hold as much as a float32
_ZERO = 8  # int4's code of 0


@dataclass(frozen=True, slots=True)
class RoundedQueries:
    """Queries [n, C, D] rounded to integers, each to `limbs` vectors: what rounding takes away is rounded in turn.

    codes: at each checkpoint, for each level one matrix (int8 rows) or two (int4), int8 [limbs * n, width]
    steps: float32 [C, matrices, limbs * n];  offsets: int32, as `steps`, what is subtracted from the products
    residuals: [n, C, D] float32, what the last limb has left
    residual_norms: [n, C, levels] float32, of the residuals in each level, rounded up
    """

    limbs: int
    codes: list[list[Tensor]]
    steps: Tensor
    offsets: Tensor
    residuals: Tensor
    residual_norms: Tensor


def round_queries(
    queries: Tensor, levels: Sequence[int], column_scales: Tensor | None, limbs: int = 1
) -> RoundedQueries:
    """queries: float32 [n, C, D] of norms about 1;  column_scales: [C, D], of int4 rows at these checkpoints."""
    rounded: list[RoundedQueries] = []
    for _ in range(limbs):
        rounded.append(_rounded_once(rounded[-1].residuals if rounded else queries, levels, column_scales))
    return RoundedQueries(
        limbs,
        [
            [torch.cat(matrices) for matrices in zip(*at_checkpoint, strict=True)]
            for at_checkpoint in zip(*(limb.codes for limb in rounded), strict=True)
        ],
        torch.cat([limb.steps for limb in rounded], dim=2),
        torch.cat([limb.offsets for limb in rounded], dim=2),
        rounded[-1].residuals,
        rounded[-1].residual_norms,
    )


def _rounded_once(queries: Tensor, levels: Sequence[int], column_scales: Tensor | None) -> RoundedQueries:
    exact = queries.double()
    scaled = exact if column_scales is None else exact * column_scales.double()
    codes, steps, restored = [], [], []
    for columns in scaled.split(level_widths(levels), dim=2):
        rounded = [_round(columns)] if column_scales is None else _round_pairs(columns)
        codes += [integers for integers, _ in rounded]
        steps += [step for _, step in rounded]
        values = [integers * step[..., None] for integers, step in rounded]
        restored.append(values[0] if column_scales is None else _unpaired(*values)[..., : columns.shape[2]])
    residuals = torch.cat(restored, dim=2)
    residuals = exact - (residuals if column_scales is None else residuals / column_scales.double())
    norms = [columns.norm(dim=2) for columns in residuals.split(level_widths(levels), dim=2)]
    offsets = torch.stack([integers.sum(2).T * (0 if column_scales is None else _ZERO) for integers in codes], dim=1)
    return RoundedQueries(
        1,
        [[matrix[:, position].to(torch.int8) for matrix in codes] for position in range(queries.shape[1])],
        torch.stack([step.T for step in steps], dim=1).float(),
        offsets.to(torch.int32),
        residuals.float(),
        rounded_up(torch.stack(norms, dim=2)),
    )


def _round(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and steps, float64, with columns ~ integers * steps. [n, C, width] -> [n, C, width], [n, C]"""
    steps = (columns.abs().amax(dim=2) / LARGEST_CODE).clamp_min_(_SMALLEST_STEP).float().double()
    return (columns / steps[..., None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE), steps


def _round_pairs(columns: Tensor) -> list[tuple[Tensor, Tensor]]:
    """As `_round`, of x / 16 and of y - x / 16: x are the second columns of each pair, y the first."""
    pairs = F.pad(columns, (0, columns.shape[2] % 2)).unflatten(2, (-1, 2))
    seconds, steps = _round(pairs[..., 1] / 16)
    return [(seconds, steps), _round(pairs[..., 0] - seconds * steps[..., None])]


def _unpaired(sixteenths: Tensor, differences: Tensor) -> Tensor:
    return torch.stack([sixteenths + differences, sixteenths * 16], dim=3).flatten(2)


def can_scan(store: RowStore) -> bool:
    """Whether the store's rows are integers, and products of integers are exact and fast here."""
    return store.precision in ("int8", "int4") and max(level_widths(store.levels)) <= MOST_COLUMNS and is_usable()


def scan(store: RowStore, queries: RoundedQueries, checkpoints: Sequence[int], most_threads: int) -> Tensor:
    """Estimates of the scores of all rows, [n, rows] float32. Uses up to `most_threads` threads.

    Beside what the residuals are off, they are off by the rounding of float32: relative to the sum over checkpoints and
    levels of the norms of query and row multiplied, by less than (levels + checkpoints + 8) 2^-21.
    """
    estimates = torch.empty(queries.steps.shape[2], store.rows)  # [limbs * n, rows]
    store.expect_scan(checkpoints, True)
    try:
        # The shards of every checkpoint hold the same stretches of rows.
        for stretch in zip(*(store.shards(checkpoint) for checkpoint in checkpoints), strict=True):
            start, first = stretch[0]
            shards = [shard for _, shard in stretch]
            _scan_stretch(shards, queries, estimates[:, start : start + first.rows], most_threads)
    finally:
        store.expect_scan(checkpoints, False)
    return estimates if queries.limbs == 1 else estimates.unflatten(0, (queries.limbs, -1)).sum(dim=0)


def scan_scores(store: RowStore, queries: Tensor, checkpoints: Sequence[int]) -> Tensor:
    """The scores of all rows, [n, rows] float32, right up to the rounding of float32.

    queries: [n, C, D] float32
    """
    exponents = torch.frexp(queries.double().flatten(1).norm(dim=1)).exponent
    scaled = torch.ldexp(queries.double(), -exponents[:, None, None]).float()
    rounded = round_queries(scaled, store.levels, store.column_scales(checkpoints), _LIMBS_OF_A_FLOAT)
    count = torch.get_num_threads()
    with threads(1):
        sums = scan(store, rounded, checkpoints, count)
    return torch.ldexp(sums, exponents[:, None])


def _scan_stretch(shards: Sequence[Shard], queries: RoundedQueries, estimates: Tensor, most_threads: int) -> None:
    """shards: of the same rows, one for each checkpoint;  estimates: [n, rows], to write to"""
    rows = estimates.shape[1]
    workers = max(1, min(most_threads, rows // _ROWS_PER_THREAD))
    edges = [rows * worker // workers // 8 * 8 for worker in range(workers)] + [rows]

    def work(edge: tuple[int, int]) -> None:
        _BlockScan(shards, queries, edge[1] - edge[0]).scan(estimates, *edge)

    if workers == 1:
        work((0, rows))
    else:
        list(_pool(workers).map(work, pairwise(edges)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads with rows of their own. Those of PyTorch wait for each other in every product, many times as long as it
    takes where another process keeps a core busy."""
    # A thread learns how many threads its operations may use when it first asks.
    return ThreadPoolExecutor(workers, "gradtrace-scan", initializer=torch.get_num_threads)


class _BlockScan:
    """The buffers of one thread."""

    def __init__(self, shards: Sequence[Shard], queries: RoundedQueries, rows: int) -> None:
        self._shards, self._queries = shards, queries
        _, self._matrices, count = queries.steps.shape
        self._rows = min(rows, max(8, _BLOCK_PRODUCTS // count // 8 * 8))
        self._integers = torch.empty(count * self._rows, dtype=torch.int32)
        self._floats = torch.empty(self._matrices * count * self._rows)
        self._packed = shards[0].layout.precision == "int4"
        self._bytes = torch.empty(2, _PIECE_BYTES if self._packed else 0, dtype=torch.uint8)

    def scan(self, estimates: Tensor, start: int, stop: int) -> None:
        """Write the estimates of rows [start, stop)."""
        for low in range(start, stop, self._rows):
            block = slice(low, min(low + self._rows, stop))
            sums = estimates[:, block].zero_()
            shape = (self._matrices, *sums.shape)  # [matrices, n, rows of the block]
            products = self._floats[: math.prod(shape)].view(shape)
            for position, shard in enumerate(self._shards):
                for level, values in enumerate(shard.levels):
                    self._multiply(values[block], position, level, products)
                sums.addcmul_(products.mul_(self._queries.steps[position, :, :, None]).sum(dim=0), shard.scales[block])

    def _multiply(self, rows: Tensor, position: int, level: int, products: Tensor) -> None:
        """The products of a level's stored values [b, width].  products: float32 [matrices, n, b], to write to"""
        codes, start = self._queries.codes[position], 0
        for piece in rows.split(max(8, _PIECE_BYTES // rows.shape[1] // 8 * 8)):
            columns = slice(start, start + piece.shape[0])
            if self._packed:
                both, low = (bytes_[: piece.numel()].view(piece.shape) for bytes_ in self._bytes)
                torch.bitwise_xor(piece, 128, out=both)
                torch.bitwise_and(piece, 15, out=low)
                for matrix, nibbles in ((2 * level, both), (2 * level + 1, low)):
                    integers = self._product(codes[matrix], nibbles.view(torch.int8))
                    products[matrix, :, columns] = integers.sub_(self._queries.offsets[position, matrix, :, None])
            else:
                products[level, :, columns] = self._product(codes[level], piece)
            start = columns.stop

    def _product(self, codes: Tensor, rows: Tensor) -> Tensor:
        """[n, rows] int32, valid until the next call."""
        shape = (codes.shape[0], rows.shape[0])
        integers = self._integers[: math.prod(shape)].view(shape)
        integer_product(codes, rows, integers)
        return integers
