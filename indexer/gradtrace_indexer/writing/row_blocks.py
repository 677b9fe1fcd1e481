"""The rows of a store as an approximate index takes them: all checkpoints side by side, the longest row about one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradtrace.store.rows import RowStore

_BLOCK_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 30


def row_blocks(store: RowStore) -> Iterator[NDArray[np.float32]]:
    """All rows in order, [b, C * D], 64 MB at a time."""
    factor = _factor(store)
    for _, block in store.blocks(range(store.checkpoints), max(1, _BLOCK_BYTES // _row_bytes(store))):
        rows: NDArray[np.float32] = block.flatten(1).mul_(factor).numpy()
        yield rows


def sampled_rows(store: RowStore, count: int) -> NDArray[np.float32]:
    """Some `count` rows, always the same, of 1 GB at most. [<= count, C * D]."""
    count = min(count, store.rows, max(1, _SAMPLE_BYTES // _row_bytes(store)))
    chosen = np.sort(np.random.default_rng(0).choice(store.rows, count, replace=False))
    rows: NDArray[np.float32] = np.empty((count, store.checkpoints * store.dimensions), np.float32)
    piece = max(1, _BLOCK_BYTES // _row_bytes(store))
    for start in range(0, count, piece):
        found = store.gather(range(store.checkpoints), chosen[start : start + piece])
        rows[start : start + piece] = found.flatten(1).mul_(_factor(store)).numpy()
    return rows


def _row_bytes(store: RowStore) -> int:
    return 4 * store.checkpoints * store.dimensions


def _factor(store: RowStore) -> float:
    """A power of two, so that it rounds nothing: no order changes, and float16 codes neither overflow nor vanish."""
    squares = sum(store.norms(checkpoint).astype(np.float64) ** 2 for checkpoint in range(store.checkpoints))
    longest = math.sqrt(np.max(squares, initial=0))
    return 2.0 ** -math.frexp(longest)[1]
