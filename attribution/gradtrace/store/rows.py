"""Reading the rows of an index and their norms, over all shards of a manifest."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import CorruptIndexError, QueryError
from gradtrace.store.dense_rows import DenseRows, RowPass
from gradtrace.store.manifest import Manifest, ShardEntry
from gradtrace.store.precision import decode, load_column_scales, unpack
from gradtrace.store.regular_files import regular_path
from gradtrace.store.shards import REPRESENTATION_PRECISION, Shard, ShardLayout

_SCAN_SHARE = 8  # rows whose pages are more than 1 / 8 of a level's bytes are read with the read-ahead of a scan
_PIECE_VALUES = 1 << 18  # values that are decoded at a time, so that they stay in the processor's cache


class RowStore(DenseRows):
    """The rows of an index in the coordinates of its basis, memory-mapped. Shards are opened at their first use.

    levels: column boundaries, ascending; the last equals `dimensions`
    precision: of the stored values
    """

    def __init__(self, directory: Path, manifest: Manifest, window: range | None = None) -> None:
        super().__init__(directory, manifest, window)
        self.levels = list(manifest.levels)
        self.precision = manifest.precision
        self.dimensions = self.levels[-1]
        self._open: dict[str, Shard] = {}
        self._layout = ShardLayout(1, tuple(self.levels), manifest.precision)  # of one row
        self._check_sizes()
        scales_of_runs = load_column_scales(directory, manifest)
        scales = [scales_of_runs[entry.run] for entry in manifest.checkpoints] if scales_of_runs else []
        self._column_scales = torch.stack(scales) if scales else None  # [checkpoints, D]

    def _check_sizes(self) -> None:
        """Raises CorruptIndexError where a shard is not as long as its rows are."""
        for entry in self._manifest.shards:
            if entry.rows.bytes != self._shard_layout(entry).bytes:
                raise CorruptIndexError(
                    f"{self._directory} is damaged: {entry.rows.path} of {entry.rows.bytes} bytes cannot hold rows "
                    f"{entry.start} to {entry.stop}: rebuild the index"
                )

    def _shard_layout(self, entry: ShardEntry) -> ShardLayout:
        return ShardLayout(entry.stop - entry.start, tuple(self.levels), self._manifest.precision)

    def _shard(self, checkpoint: int, number: int) -> Shard:
        entry = self._entries[checkpoint][number]
        name = entry.rows.path
        if name not in self._open:
            path = regular_path(self._directory, name)
            self._open[name] = Shard(path, self._shard_layout(entry), self._cuts[number])
        return self._open[name]

    def _readable_shard(self, checkpoint: int, number: int) -> Shard:
        """An open shard whose rows are about to be read. Raises CorruptIndexError if its file was truncated since."""
        shard = self._shard(checkpoint, number)
        shard.check_size()
        return shard

    def shards(self, checkpoint: int) -> Iterator[tuple[int, Shard]]:
        """The first row of each shard and the shard, open, in the order of the rows. Raises CorruptIndexError."""
        for number, start in enumerate(self._starts.tolist()):
            yield start, self._readable_shard(checkpoint, number)

    def open_all(self) -> None:
        """Open every shard now: an open shard stays readable even if its file is deleted."""
        for checkpoint in range(self.checkpoints):
            list(self.shards(checkpoint))

    def first_levels(self, checkpoint: int) -> Iterator[tuple[int, Tensor]]:
        """The first level of all rows in order, as (first row, [rows of a shard, width] float32)."""
        for start, shard in self.shards(checkpoint):
            yield start, decode(shard.levels[0], shard.scales, self._scales_of(checkpoint, 0))

    def column_scales(self, checkpoints: Sequence[int]) -> Tensor | None:
        """What the columns were divided by before they were rounded, [len(checkpoints), D]; None unless int4."""
        return None if self._column_scales is None else self._column_scales[list(checkpoints)]

    def _scales_of(self, checkpoints: int | Sequence[int], level: int) -> Tensor | None:
        """Column scales of one level: [width] at one checkpoint, [len(checkpoints), width] at several. None unless
        int4."""
        if self._column_scales is None:
            return None
        stop = self.levels[level]
        return self._column_scales[checkpoints, stop - self._layout.widths[level] : stop]

    def tails(self, checkpoint: int, level: int) -> Tensor:
        """Upper bound of the norm of each row's columns from `level` on. float32 [rows]."""
        by_shard = [shard.tails[:, level] for _, shard in self.shards(checkpoint)]
        return torch.cat(by_shard) if by_shard else torch.zeros(0)

    def norms(self, checkpoint: int) -> NDArray[np.float32]:
        """The Euclidean norm of each row, at most two float32 steps too large. float32 [rows]."""
        norms: NDArray[np.float32] = self.tails(checkpoint, 0).numpy()
        return norms

    def gather(self, checkpoints: Sequence[int], rows: Tensor | NDArray[np.int64] | Sequence[int]) -> Tensor:
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if bool((rows[1:] < rows[:-1]).any()):
            ascending, order = rows.sort()
            return self.gather(checkpoints, ascending)[order.argsort()]
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= self.rows):
            raise QueryError(f"rows must lie in 0 to {self.rows - 1}; got {int(rows[0])} to {int(rows[-1])}")
        levels, scales = self._gather_stored(checkpoints, rows.numpy())
        out = torch.empty(len(checkpoints), len(rows), self.dimensions)
        for number, target in enumerate(out.split(self._layout.widths, dim=2)):
            column_scales = self._scales_of(list(checkpoints), number)
            broadcast = None if column_scales is None else column_scales[:, None]  # over the rows
            decode(levels[number], scales, broadcast, target)
        return out.transpose(0, 1)

    def _gather_stored(self, checkpoints: Sequence[int], rows: NDArray[np.int64]) -> tuple[list[Tensor], Tensor]:
        """Stored values of ascending rows [m], of each level [C, m, stored width], and their scales [C, m]."""
        shapes = [(len(checkpoints), len(rows), width) for width in self._layout.stored_widths]
        levels = [torch.empty(shape, dtype=self._layout.dtype) for shape in shapes]
        arrays = [level.numpy() for level in levels]
        scales = np.empty((len(checkpoints), len(rows)), dtype=np.float32)
        for number, places, local in self._by_shard(rows):
            for position, checkpoint in enumerate(checkpoints):
                shard = self._readable_shard(checkpoint, number)
                shard.scale_array.take(local, out=scales[position, places], mode="clip")
                for values, level in zip(shard.level_arrays, arrays, strict=True):
                    values.take(local, axis=0, out=level[position, places], mode="clip")
        return levels, torch.from_numpy(scales)

    def inner_products(self, checkpoints: Sequence[int], rows: NDArray[np.int64], vectors: Tensor) -> Tensor:
        """Sum over checkpoints of <row, vector>. float32 [m].

        rows: [m], ascending, all in the index;  vectors: float32 [len(checkpoints), dimensions]
        """
        column_scales = self.column_scales(checkpoints)
        by_level = (vectors if column_scales is None else vectors * column_scales).split(self._layout.widths, dim=1)
        step = max(1, _PIECE_VALUES // self._layout.widths[-1])
        out = torch.zeros(len(rows))
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            levels, scales = self._gather_stored(checkpoints, rows[piece])
            for position in range(len(checkpoints)):
                sums = torch.zeros(scales.shape[1])
                for stored, columns in zip(levels, by_level, strict=True):
                    codes = stored[position] if column_scales is None else unpack(stored[position], columns.shape[1])
                    sums.addmv_(codes.float(), columns[position])
                out[piece].addcmul_(sums, scales[position])
        return out

    def products(self, checkpoint: int, rows: Tensor, level: int, vector: Tensor) -> Tensor:
        """<row's columns of one level, vector>. float32 [m].

        rows: int64 [m], ascending;  vector: float32 [width of the level]
        """
        column_scales = self._scales_of(checkpoint, level)
        vector = vector if column_scales is None else vector * column_scales
        row_bytes = self._layout.stored_widths[level] * self._layout.dtype.itemsize
        scan = len(rows) * (row_bytes + mmap.PAGESIZE) * _SCAN_SHARE > self.rows * row_bytes
        if scan:
            self.expect_scan([checkpoint], True)
        out, scales = torch.empty(len(rows)), np.empty(len(rows), dtype=np.float32)
        step = min(len(rows), max(1, _PIECE_VALUES // len(vector)))
        stored = torch.empty(step, self._layout.stored_widths[level], dtype=self._layout.dtype).numpy()
        codes = torch.empty(step, len(vector))
        for start in range(0, len(rows), max(1, step)):
            piece = slice(start, min(start + step, len(rows)))
            count = piece.stop - start
            for number, places, local in self._by_shard(rows[piece].numpy()):
                shard = self._readable_shard(checkpoint, number)
                shard.level_arrays[level].take(local, axis=0, out=stored[places], mode="clip")
                shard.scale_array.take(local, out=scales[piece][places], mode="clip")
            packed = torch.from_numpy(stored[:count])
            codes[:count].copy_(packed if column_scales is None else unpack(packed, len(vector)))
            torch.mv(codes[:count], vector, out=out[piece])
        if scan:
            self.expect_scan([checkpoint], False)
        return out.mul_(torch.from_numpy(scales))

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, slice, NDArray[np.int64]]]:
        """Split ascending rows [m] by shard: (number of the shard, slice of `rows`, their positions in the shard)."""
        edges = [*rows.searchsorted(self._starts).tolist(), len(rows)]
        for number, (low, high) in enumerate(pairwise(edges)):
            if low < high:
                yield number, slice(low, high), rows[low:high] - self._starts[number]

    def blocks(self, checkpoints: Sequence[int], block_rows: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, in blocks: (first row, float32 [b, len(checkpoints), dimensions]), b <= block_rows."""
        self.expect_scan(checkpoints, True)
        try:
            for start in range(0, self.rows, block_rows):
                stop = min(start + block_rows, self.rows)
                block = torch.empty(stop - start, len(checkpoints), self.dimensions)
                for position, checkpoint in enumerate(checkpoints):
                    self._read(checkpoint, start, stop, block[:, position])
                yield start, block
        finally:
            self.expect_scan(checkpoints, False)

    def each_row(self, checkpoints: Sequence[int], block_rows: int, row_pass: RowPass) -> Tensor:
        results: Tensor | None = None
        for start, block in self.blocks(checkpoints, block_rows):
            computed = row_pass(start, block)
            results = computed.new_empty(self.rows, *computed.shape[1:]) if results is None else results
            results[start : start + len(block)] = computed
        return row_pass(0, torch.empty(0, len(checkpoints), self.dimensions)) if results is None else results

    def expect_scan(self, checkpoints: Sequence[int], scan: bool) -> None:
        """Tell the operating system how the later levels are read next: from end to end, or row by row."""
        for checkpoint in checkpoints:
            for _, shard in self.shards(checkpoint):
                shard.expect(scan)

    def _read(self, checkpoint: int, start: int, stop: int, out: Tensor) -> None:
        """Decode rows [start, stop) into `out`, [stop - start, dimensions]."""
        for first, shard in self.shards(checkpoint):
            low, high = max(start, first), min(stop, first + shard.rows)
            if low >= high:
                continue
            shard_rows, local = out[low - start : high - start], slice(low - first, high - first)
            for level, target in enumerate(shard_rows.split(self._layout.widths, dim=1)):
                decode(shard.levels[level][local], shard.scales[local], self._scales_of(checkpoint, level), target)


def representation_store(directory: Path, manifest: Manifest, window: range | None = None) -> RowStore | None:
    """A store whose rows are the representations, see `representations_manifest`; None if the index has none."""
    representations = representations_manifest(manifest)
    return None if representations is None else RowStore(directory, representations, window)


def representations_manifest(manifest: Manifest) -> Manifest | None:
    """That of an index whose rows are the representations of this one; None if it has none.

    Its checkpoint c is checkpoint `manifest.represented[c]` of the index.

    Raises:
        CorruptIndexError: representations of some rows are missing.
    """
    if manifest.representations is None:
        return None
    numbers = {checkpoint: number for number, checkpoint in enumerate(manifest.represented)}
    shards = [
        shard.model_copy(update={"checkpoint": numbers[shard.checkpoint], "rows": shard.representations})
        for shard in manifest.shards
        if shard.checkpoint in numbers and shard.representations is not None
    ]
    update = {
        "checkpoints": [manifest.checkpoints[checkpoint] for checkpoint in numbers],
        "levels": [manifest.representations.dimensions],
        "precision": REPRESENTATION_PRECISION,
        "column_scales": [],
        "shards": shards,
    }
    return manifest.model_copy(update=update)
