"""A shard: the rows of a stretch of training examples at one checkpoint, in one file.

Layout, little endian, no header (the manifest says rows, levels and precision), every block at a multiple of 64 bytes
and the gaps zero:

    for each level   values [rows, width of the level]   float16 or int8, or two int4 in a byte; row-major
    scales           [rows]                              float32, value = stored * scale
    tail norms       [rows, levels]                      float32, see `precision.tail_norms`

Coordinates are in energy order, so the first level holds most of every row, and a search reads little else.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.store.manifest import Precision
from gradtrace.store.precision import STORED_DTYPES, stored_width

ALIGNMENT = 64
REPRESENTATION_PRECISION: Precision = "float16"
_HASH_CHUNK = 1 << 22


def default_levels(dimensions: int) -> list[int]:
    """Column boundaries for the progressive search: 32, 256, 1024, 4096, ... as far as they fit, and `dimensions`.

    Measured on gradients of well and of badly fitted models: a wider first level costs every query and every row more
    memory than it saves in survivors; more levels cost as many reads as they save.

    >>> default_levels(2048)
    [32, 256, 1024, 2048]
    """
    steps = [32, *(256 * 4**power for power in range(16))]
    # A last level narrower than half the one before it would cost a read and prune next to nothing.
    return [*(step for step in steps if step * 1.5 < dimensions), dimensions]


@dataclass(frozen=True)
class ShardLayout:
    """Where each block of a shard lies."""

    rows: int
    levels: tuple[int, ...]
    precision: Precision

    def __post_init__(self) -> None:
        if self.precision == "int4" and any(edge % 2 for edge in self.levels[:-1]):
            raise StoreError(f"int4 stores two columns in a byte: levels must be of even width, not {self.levels}")

    @property
    def dimensions(self) -> int:
        return self.levels[-1]

    @cached_property
    def widths(self) -> list[int]:
        return [stop - start for start, stop in zip((0, *self.levels[:-1]), self.levels, strict=True)]

    @cached_property
    def stored_widths(self) -> list[int]:
        """Elements of `dtype` that each level takes of a row."""
        return [stored_width(width, self.precision) for width in self.widths]

    @cached_property
    def dtype(self) -> torch.dtype:
        return STORED_DTYPES[self.precision]

    @cached_property
    def _ends(self) -> list[int]:
        value_bytes = self.dtype.itemsize
        sizes = [self.rows * width * value_bytes for width in self.stored_widths] + [
            self.rows * 4,
            self.rows * len(self.levels) * 4,
        ]
        return list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))

    @cached_property
    def level_offsets(self) -> list[int]:
        return [0, *self._ends[: len(self.levels) - 1]]

    @property
    def scales_offset(self) -> int:
        return self._ends[-3]

    @property
    def tails_offset(self) -> int:
        return self._ends[-2]

    @property
    def bytes(self) -> int:
        return self._ends[-1]


def representation_layout(rows: int, dimensions: int) -> ShardLayout:
    """Of a shard of last hidden representations: one level, as they are read from end to end."""
    return ShardLayout(rows, (dimensions,), REPRESENTATION_PRECISION)


class Shard:
    """An open shard: tensors that are views of the mapped file. Never write to them.

    levels: per level [rows, stored width] as `precision.encode` makes them;  scales: [rows] float32
    tails: [rows, levels] float32
    level_arrays, scale_array: the same memory for NumPy, which picks rows faster
    """

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self._map = _map_file(path, layout.bytes)
        self.layout = layout
        self.levels = [
            self._view(layout.dtype, offset, layout.rows, width)
            for offset, width in zip(layout.level_offsets, layout.stored_widths, strict=True)
        ]
        self.scales = self._view(torch.float32, layout.scales_offset, layout.rows)
        self.tails = self._view(torch.float32, layout.tails_offset, layout.rows, len(layout.levels))
        self.level_arrays: list[NDArray[Any]] = [level.numpy() for level in self.levels]
        self.scale_array: NDArray[np.float32] = self.scales.numpy()
        self.expect_gathers()

    def _view(self, dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def expect_gathers(self) -> None:
        """Tell the system that single rows of the later levels are read next: no read-ahead around each."""
        self._advise(mmap.MADV_RANDOM)

    def expect_scan(self) -> None:
        """Tell the system that the later levels are read from end to end next."""
        self._advise(mmap.MADV_NORMAL)

    def _advise(self, advice: int) -> None:
        if len(self.layout.levels) > 1:
            start = self.layout.level_offsets[1] // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(advice, start, self.layout.scales_offset - start)


def _map_file(path: Path, size: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            actual = file.seek(0, 2)
            if actual != size:
                raise CorruptIndexError(
                    f"{path} has {actual} bytes, {size} are expected: it was truncated or replaced; "
                    "restore it or rebuild the index"
                )
            # A private mapping: PyTorch warns of read-only buffers, and a stray write could not reach the file.
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise CorruptIndexError(f"{path} is missing: restore it or rebuild the index") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error}") from error


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content as hexadecimal digits, as in `FileEntry.xxh3`. Raises OSError."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
