"""The read side of an index: rows, norms and columns over all shards of a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import CorruptIndexError, QueryError
from gradtrace.manifest import FileEntry, Manifest
from gradtrace.shards import Shard, ShardLayout, hash_file

_HASH_THREADS = 4
_SCAN_SHARE = 8  # from one row in so many on, reading ahead is cheaper than single rows
_PIECE_VALUES = 1 << 18
# PyTorch shares work on more values than this with its other threads. Waiting for those costs milliseconds wherever
# another process keeps a core busy, so only many values are worth it.
_SERIAL_VALUES = (1 << 15) - 1
_MANY_VALUES = 1 << 21


class RowStore:
    """The rows of an index, memory-mapped. Shards are opened at their first use; one thread at a time may read.

    rows, dimensions, checkpoints: numbers of training rows, of coordinates per checkpoint, and of checkpoints
    levels: column boundaries, ascending, the last equals dimensions
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.rows = manifest.rows
        self.dimensions = manifest.basis.dimensions
        self.checkpoints = len(manifest.checkpoints)
        self.levels = list(manifest.levels)
        self._directory = directory
        self._manifest = manifest
        self._open: dict[str, Shard] = {}
        self._entries = [
            sorted((s for s in manifest.shards if s.checkpoint == c), key=lambda s: s.start)
            for c in range(self.checkpoints)
        ]
        self._check_stretches()
        self._starts = torch.tensor([start for start, _ in self._stretches(0)], dtype=torch.int64)

    def _stretches(self, checkpoint: int) -> list[tuple[int, int]]:
        return [(entry.start, entry.stop) for entry in self._entries[checkpoint]] if self._entries else []

    def _check_stretches(self) -> None:
        for checkpoint in range(self.checkpoints):
            edges = [0, *(stop for _, stop in self._stretches(checkpoint))]
            starts = [start for start, _ in self._stretches(checkpoint)]
            if edges[:-1] != starts or edges[-1] != self.rows or self._stretches(checkpoint) != self._stretches(0):
                name = self._manifest.checkpoints[checkpoint].name
                raise CorruptIndexError(
                    f"the shards of checkpoint {name} do not cover its {self.rows} rows in the same stretches as those "
                    f"of the first checkpoint: rebuild {self._directory}"
                )

    def _shard(self, checkpoint: int, number: int) -> Shard:
        entry = self._entries[checkpoint][number]
        name = entry.rows.path
        if name not in self._open:
            layout = ShardLayout(entry.stop - entry.start, tuple(self.levels), self._manifest.precision)
            self._open[name] = Shard(self._directory / name, layout)
        return self._open[name]

    def shards(self, checkpoint: int) -> Iterator[tuple[int, Shard]]:
        """The first row and the open shard of each stretch of rows, in order."""
        for number, entry in enumerate(self._entries[checkpoint]):
            yield entry.start, self._shard(checkpoint, number)

    def tails(self, checkpoint: int, level: int) -> Tensor:
        """Upper bounds of the norms of each row's coordinates from `level` on. [rows] float32."""
        parts = [shard.tails[:, level] for _, shard in self.shards(checkpoint)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def norms(self, checkpoint: int) -> NDArray[np.float32]:
        """The Euclidean norm of each row, at most two float32 steps too large. [rows] float32."""
        norms: NDArray[np.float32] = self.tails(checkpoint, 0).numpy()
        return norms

    def gather(self, checkpoints: Sequence[int], rows: Tensor | NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Some rows, dequantised. [m, len(checkpoints), dimensions] float32.

        Raises:
            QueryError: a row that the index does not have.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if bool((rows[1:] < rows[:-1]).any()):
            ascending, order = rows.sort()
            return self.gather(checkpoints, ascending)[order.argsort()]
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= self.rows):
            raise QueryError(f"rows must lie in 0 to {self.rows - 1}; got {int(rows[0])} to {int(rows[-1])}")
        shape = len(rows), len(checkpoints), self.dimensions
        stored = np.empty(shape, self._manifest.precision)
        scales = torch.empty(*shape[:2], 1)
        for number, places, local in self._by_shard(rows):
            for position, checkpoint in enumerate(checkpoints):
                shard = self._shard(checkpoint, number)
                scales[places, position, 0] = shard.scales[local]
                for values, low, high in zip(shard.levels, [0, *self.levels], self.levels, strict=False):
                    stored[places, position, low:high] = values.numpy()[local.numpy()]
        return _decode(torch.from_numpy(stored), scales, torch.empty(shape))

    def products(self, checkpoint: int, rows: Tensor, level: int, vector: Tensor) -> Tensor:
        """<row's columns of one level, vector>, for ascending rows [m] int64, vector [width]. [m] float32."""
        out = torch.empty(len(rows))
        many = len(rows) * _SCAN_SHARE > self.rows
        for number, places, local in self._by_shard(rows):
            shard = self._shard(checkpoint, number)
            if many:
                shard.expect_scan()
            torch.mul(_products(shard.levels[level], local, vector), shard.scales[local], out=out[places])
            if many:
                shard.expect_gathers()
        return out

    def _by_shard(self, rows: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Split ascending rows [m] by stretch: (its number, places in `rows`, numbers inside its shards)."""
        edges = [*torch.searchsorted(rows, self._starts).tolist(), len(rows)]
        for number, (start, low, high) in enumerate(zip(self._starts.tolist(), edges[:-1], edges[1:], strict=True)):
            if low < high:
                yield number, slice(low, high), rows[low:high] - start

    def blocks(self, checkpoints: Sequence[int], block_rows: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, as (first row, [b, len(checkpoints), dimensions] float32), b at most `block_rows`."""
        self._expect(checkpoints, scan=True)
        try:
            for start in range(0, self.rows, block_rows):
                stop = min(start + block_rows, self.rows)
                block = torch.empty(stop - start, len(checkpoints), self.dimensions)
                for position, checkpoint in enumerate(checkpoints):
                    self._read(checkpoint, start, stop, block[:, position])
                yield start, block
        finally:
            self._expect(checkpoints, scan=False)

    def _expect(self, checkpoints: Sequence[int], scan: bool) -> None:
        for checkpoint in checkpoints:
            for _, shard in self.shards(checkpoint):
                shard.expect_scan() if scan else shard.expect_gathers()

    def _read(self, checkpoint: int, start: int, stop: int, out: Tensor) -> None:
        """Dequantise rows [start, stop) into `out`, [stop - start, dimensions]."""
        for first, shard in self.shards(checkpoint):
            low, high = max(start, first), min(stop, first + shard.layout.rows)
            if low >= high:
                continue
            part, local = out[low - start : high - start], slice(low - first, high - first)
            for values, target in zip(shard.levels, shard.split(part), strict=True):
                target.copy_(values[local])
            part.mul_(shard.scales[local, None])

    def columns(self, checkpoint: int) -> dict[str, NDArray[Any]]:
        """label, prediction, loss, correct and norm of every row at a checkpoint, each [rows].

        A whole-number column with nulls comes as float64 with NaN, a boolean one with nulls as objects with None.

        Raises:
            CorruptIndexError: a file is missing or no Parquet.
        """
        tables = [self._table(entry.columns) for entry in self._entries[checkpoint]]
        table = pyarrow.concat_tables(tables, promote_options="permissive") if tables else pyarrow.table({})
        return {name: table.column(name).to_numpy() for name in table.column_names}

    def _table(self, entry: FileEntry) -> pyarrow.Table:
        path = self._directory / entry.path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would load pyarrow.dataset (0.4 s)
                return file.read()
        except (OSError, pyarrow.ArrowException) as error:
            raise CorruptIndexError(f"{path} cannot be read: {error}; restore it or rebuild the index") from error

    def check_files(self, deep: bool) -> list[str]:
        """What is wrong with the files that the manifest names, one sentence each. Empty where all is well.

        Finds missing files and wrong sizes and, if `deep`, other content.
        """
        manifest = self._manifest
        files = [manifest.basis.file, *manifest.curvature]
        files += [file for shard in manifest.shards for file in (shard.rows, shard.columns)]
        files += [manifest.searcher.file] if manifest.searcher else []
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            problems = list(pool.map(lambda entry: check_file(self._directory, entry, deep), files))
        return [problem for problem in problems if problem]


def _products(values: Tensor, rows: Tensor, vector: Tensor) -> Tensor:
    """values[rows].float() @ vector, in pieces that stay in the processor's cache, without a new buffer for each."""
    piece = min(len(rows), max(1, _PIECE_VALUES // len(vector)))
    stored = torch.empty(piece, len(vector), dtype=values.dtype)
    decoded = torch.empty(piece, len(vector))
    out = torch.empty(len(rows))
    for start in range(0, len(rows), max(1, piece)):
        some = rows[start : start + piece]
        count = len(some)
        values.numpy().take(some.numpy(), axis=0, out=stored[:count].numpy(), mode="clip")
        if len(rows) * len(vector) > _MANY_VALUES:
            decoded[:count].copy_(stored[:count])
        else:
            _decode(stored[:count], None, decoded[:count])
        torch.mv(decoded[:count], vector, out=out[start : start + count])
    return out


def _decode(stored: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
    """out = stored * scales, row by row of [n, ...], on this thread alone."""
    rows_at_once = max(1, _SERIAL_VALUES // max(1, stored[:1].numel()))
    for start in range(0, len(stored), rows_at_once):
        part = slice(start, start + rows_at_once)
        out[part].copy_(stored[part])
        if scales is not None:
            out[part].mul_(scales[part])
    return out


def check_file(directory: Path, entry: FileEntry, deep: bool) -> str | None:
    """What is wrong with a file, None where nothing is; `deep` compares its content, too."""
    path = directory / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes, {entry.bytes} are expected: it was truncated or replaced"
        if deep and hash_file(path) != entry.xxh3:
            return f"{entry.path} does not match its checksum: its bytes are damaged or replaced"
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except OSError as error:
        return f"{entry.path} cannot be read: {error.strerror}"
    return None
