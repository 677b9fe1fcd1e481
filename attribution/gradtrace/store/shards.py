"""A shard: consecutive rows at one checkpoint, in one file.

Layout, little endian, without header (the manifest has rows, levels and precision). Every block begins at a multiple of
64 bytes, and gaps are zero:

    for each level   values [rows, width of the level]   float16 or int8, or two int4 in a byte; row-major
    scales           [rows]                              float32, value = stored * scale
    tail norms       [rows, levels]                      float32, see `precision.tail_norms`

Columns are in order of energy, so the first level holds most of every row's norm, and a search reads little else.
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
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Precision
from gradtrace.store.mapped_files import check_mapped_size, map_file
from gradtrace.store.precision import STORED_DTYPES, level_widths, stored_width

ALIGNMENT = 64
REPRESENTATION_PRECISION: Precision = "float16"


def default_levels(dimensions: int) -> list[int]:
    """Column boundaries for progressive search: 32, 256, 1024, 4096, ... below `dimensions`, and `dimensions`.

    Measured on gradients of well and of badly fitted models: a wider first level costs more time per query and memory
    per row than it saves by pruning more rows; more levels cost as many reads as they save.

    >>> default_levels(2048)
    [32, 256, 1024, 2048]
    """
    steps = [32, *(256 * 4**power for power in range(16))]
    # A last level narrower than half of the one before it would cost a read and prune almost nothing.
    return [*(step for step in steps if step * 1.5 < dimensions), dimensions]


@dataclass(frozen=True)
class ShardLayout:
    """Offsets and sizes of the blocks in a shard."""

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
        return level_widths(self.levels)

    @cached_property
    def stored_widths(self) -> list[int]:
        """Number of elements of `dtype` that a row has in each level."""
        return [stored_width(width, self.precision) for width in self.widths]

    @cached_property
    def dtype(self) -> torch.dtype:
        return STORED_DTYPES[self.precision]

    @cached_property
    def offsets(self) -> list[int]:
        """Where the blocks begin: the values of each level, the scales, the tail norms; and where the file ends."""
        values = [self.rows * width * self.dtype.itemsize for width in self.stored_widths]
        sizes = [*values, self.rows * 4, self.rows * len(self.levels) * 4]
        return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    @property
    def bytes(self) -> int:
        return self.offsets[-1]


class Shard:
    """An open shard, or some consecutive rows of it: tensors that are views of the memory-mapped file. Never write to
    them.

    rows: number of these rows
    levels: of each level, [rows, stored width] as `precision.encode` returns them;  scales: float32 [rows]
    tails: float32 [rows, levels], see `precision.tail_norms`
    level_arrays, scale_array: `levels` and `scales` as NumPy arrays, which gather rows faster
    """

    def __init__(self, path: Path, layout: ShardLayout, cut: slice = slice(None)) -> None:
        """cut: the rows that are meant, counted from the shard's first; all of them by default"""
        self._path, self._map = path, map_file(path, layout.bytes)
        self.layout = layout
        *level_offsets, scales_offset, tails_offset, _ = layout.offsets
        self.levels = [
            self._view(layout.dtype, offset, layout.rows, width)[cut]
            for offset, width in zip(level_offsets, layout.stored_widths, strict=True)
        ]
        self.scales = self._view(torch.float32, scales_offset, layout.rows)[cut]
        self.tails = self._view(torch.float32, tails_offset, layout.rows, len(layout.levels))[cut]
        self.rows = len(self.scales)
        self.level_arrays: list[NDArray[Any]] = [level.numpy() for level in self.levels]
        self.scale_array: NDArray[np.float32] = self.scales.numpy()
        self.expect(scan=False)

    def _view(self, dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def check_size(self) -> None:
        """To be called before the file is read: what a file was cut off by after it was mapped cannot be read, and
        trying to ends the process.

        Raises:
            CorruptIndexError: the file has another size now.
        """
        check_mapped_size(self._path, self._map, self.layout.bytes)

    def expect(self, scan: bool) -> None:
        """Tell the operating system how the later levels are read next: from end to end, with read-ahead, in a scan;
        else row by row, without."""
        if len(self.layout.levels) > 1:
            start = self.layout.offsets[1] // mmap.PAGESIZE * mmap.PAGESIZE
            advice = mmap.MADV_NORMAL if scan else mmap.MADV_RANDOM
            self._map.madvise(advice, start, self.layout.offsets[-3] - start)
