"""The rows of a store as an approximate index takes them: checkpoints concatenated, scaled to norms of at most 1."""

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
    """At most `count` rows and 1 GB, drawn with a fixed seed. [<= count, C * D]."""
    count = min(count, store.rows, max(1, _SAMPLE_BYTES // _row_bytes(store)))
    chosen = np.sort(np.random.default_rng(0).choice(store.rows, count, replace=False))
    rows: NDArray[np.float32] = np.empty((count, store.checkpoints * store.dimensions), np.float32)
    size = max(1, _BLOCK_BYTES // _row_bytes(store))
    for start in range(0, count, size):
        block = store.gather(range(store.checkpoints), chosen[start : start + size])
        rows[start : start + size] = block.flatten(1).mul_(_factor(store)).numpy()
    return rows


def _row_bytes(store: RowStore) -> int:
    return 4 * store.checkpoints * store.dimensions


def _factor(store: RowStore) -> float:
    """A power of two, so that scaling rounds nothing and keeps every order; float16 codes can then not overflow."""
    squares = sum(store.norms(checkpoint).astype(np.float64) ** 2 for checkpoint in range(store.checkpoints))
    longest = math.sqrt(np.max(squares, initial=0))
    return 2.0 ** -math.frexp(longest)[1]
