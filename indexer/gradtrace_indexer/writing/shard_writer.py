"""The shards that a generation needs, what their files are called, and writing each under a temporary name until it is
complete and on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gradtrace.durable import WRITER, rename_durably, temporary_path
from gradtrace.errors import StoreError
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import FileEntry, Manifest, ShardEntry
from gradtrace.store.precision import decode, encode, tail_norms
from gradtrace.store.regular_files import regular_path
from gradtrace.store.shards import REPRESENTATION_PRECISION, Shard, ShardLayout
from gradtrace_indexer.writing.files import write_errors_of


class ShardWriter:
    """Writes a shard's rows batch by batch, each at its place in the file; no batch stays in memory.

    with ShardWriter(directory, "rows/a.pt/000000000.rows", layout) as writer:
        writer.append(rows)  # until layout.rows have come
        entry = writer.commit()

    Leaving the block without a commit removes the temporary file. `name` is relative to the index directory.
    """

    def __init__(self, directory: Path, name: str, layout: ShardLayout, column_scales: Tensor | None = None) -> None:
        self._path = regular_path(directory, name)
        self._temporary = temporary_path(self._path, WRITER)
        self._name = name
        self.layout, self._column_scales = layout, column_scales
        self._written = 0
        with write_errors_of(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.unlink(missing_ok=True)  # what lies there may be a link to another file
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
            position = offset + first * block.shape[1] * block.element_size()
            remaining = block.contiguous().cpu().view(torch.uint8).flatten().numpy().data
            with write_errors_of(self._path):
                while remaining:
                    count = os.pwrite(self._file.fileno(), remaining, position)
                    remaining, position = remaining[count:], position + count
        self._written += len(scales)

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

    def __exit__(self, *error: object) -> None:
        self._discard()

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class ShardTask(NamedTuple):
    """Stored rows [start, stop) at one checkpoint."""

    checkpoint: int
    start: int
    stop: int


def missing_shards(manifest: Manifest) -> list[ShardTask]:
    """The shards that an unfinished generation lacks, in the order in which they are written.

    Every checkpoint has the stretches of the first one; rows that are new there are cut into stretches of shard_rows.
    """
    stretches = manifest.stretches()
    cut = stretches[-1][1] if stretches else 0
    stretches += [
        (start, min(start + manifest.shard_rows, manifest.rows))
        for start in range(cut, manifest.rows, manifest.shard_rows)
    ]
    written = {(shard.checkpoint, shard.start) for shard in manifest.shards}
    needed = (ShardTask(number, *stretch) for number in range(len(manifest.checkpoints)) for stretch in stretches)
    return [task for task in needed if (task.checkpoint, task.start) not in written]


def shard_name(manifest: Manifest, checkpoint: int, start: int) -> str:
    """Path of a new shard's files inside their folders, without suffix; unique among all generations."""
    return f"{manifest.checkpoints[checkpoint].name}/{start:09d}.{manifest.generation}"


def representation_writer(
    directory: Path, manifest: Manifest, checkpoint: int, start: int, rows: int
) -> ShardWriter | None:
    """Writes the representations that belong to a new shard; None where its checkpoint has none."""
    if manifest.representations is None or checkpoint not in manifest.represented:
        return None
    layout = ShardLayout(rows, (manifest.representations.dimensions,), REPRESENTATION_PRECISION)
    return ShardWriter(directory, f"representations/{shard_name(manifest, checkpoint, start)}.rows", layout)


def with_shards(manifest: Manifest, added: Iterable[ShardEntry]) -> Manifest:
    shards = sorted([*manifest.shards, *added], key=lambda entry: (entry.checkpoint, entry.start))
    return manifest.model_copy(update={"shards": shards})
