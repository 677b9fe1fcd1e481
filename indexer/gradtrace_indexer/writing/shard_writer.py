"""Writes one shard under a temporary name, and renames it once it is complete and on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gradtrace.durable import rename_durably, temporary_path
from gradtrace.errors import StoreError
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import FileEntry
from gradtrace.store.precision import decode, encode, tail_norms
from gradtrace.store.shards import Shard, ShardLayout
from gradtrace_indexer.writing.files import write_errors_of


class ShardWriter:
    """Writes a shard's rows batch by batch, each at its place in the file; no batch stays in memory.

    with ShardWriter(directory, "rows/a.pt/000000000.rows", layout) as writer:
        writer.append(rows)  # until layout.rows have come
        entry = writer.commit()

    Leaving the block without a commit removes the temporary file; one that a killed process left is overwritten by the
    next writer of the same name. `name` is relative to the index directory.
    """

    def __init__(self, directory: Path, name: str, layout: ShardLayout, column_scales: Tensor | None = None) -> None:
        self._path = directory / name
        self._temporary = temporary_path(self._path)
        self._name = name
        self.layout, self._column_scales = layout, column_scales
        self._written = 0
        with write_errors_of(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb", buffering=0)
            try:
                self._file.truncate(layout.bytes)  # the gaps between blocks read as zeros
            except OSError:
                self._discard()
                raise

    def append(self, rows: Tensor) -> None:
        """Encode and write the next rows, [b, D] float32.

        Raises:
            StoreError: a wrong number of columns, more rows than the layout holds, a NaN coordinate, or a full disk.
        """
        layout, first = self.layout, self._written
        if rows.ndim != 2 or rows.shape[1] != layout.dimensions or first + len(rows) > layout.rows:
            raise StoreError(
                f"{self._path} takes {layout.rows} rows of {layout.dimensions} columns, of which {first} are written; "
                f"rows of shape {tuple(rows.shape)} do not fit"
            )
        stored, scales = encode(rows, layout.precision, self._column_scales)
        tails = tail_norms(decode(stored, scales, self._column_scales), list(layout.levels))
        self._append_blocks(torch.split(stored, layout.stored_widths, dim=1), scales, tails)

    def append_stored(self, shard: Shard, rows: Tensor) -> None:
        """Copy rows, int64 [b], of another shard with the same levels and precision, bit for bit."""
        self._append_blocks([level[rows] for level in shard.levels], shard.scales[rows], shard.tails[rows])

    def _append_blocks(self, levels: Sequence[Tensor], scales: Tensor, tails: Tensor) -> None:
        layout, first = self.layout, self._written
        for offset, block in zip(layout.offsets[:-1], [*levels, scales[:, None], tails], strict=True):
            self._write(block, offset + first * block.shape[1] * block.element_size())
        self._written += len(scales)

    def _write(self, block: Tensor, offset: int) -> None:
        remaining = block.contiguous().cpu().view(torch.uint8).flatten().numpy().data
        with write_errors_of(self._path):
            while remaining:
                count = os.pwrite(self._file.fileno(), remaining, offset)
                remaining, offset = remaining[count:], offset + count

    def commit(self) -> FileEntry:
        """Make the shard durable under its own name.

        Raises:
            StoreError: rows are missing, or the disk is full.
        """
        if self._written != self.layout.rows:
            raise StoreError(f"{self._path} needs {self.layout.rows} rows, only {self._written} were written")
        with write_errors_of(self._path):
            self._file.close()
            entry = FileEntry(path=self._name, bytes=self.layout.bytes, xxh3=hash_file(self._temporary))
            rename_durably(self._temporary, self._path)
        return entry

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)
