"""Compact an index: shards without their deleted rows, and small ones merged. No value is computed or rounded again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gradtrace.errors import CorruptIndexError
from gradtrace.store.checksums import check_file
from gradtrace.store.manifest import FileEntry, Manifest, ShardEntry, shard_files
from gradtrace.store.row_ids import RowIds, read_row_ids
from gradtrace.store.shards import Shard, ShardLayout
from gradtrace_indexer.build.builder import representation_writer, shard_name, with_shard
from gradtrace_indexer.generations import publish, save_pending, successor, updating
from gradtrace_indexer.writing.columns import gathered
from gradtrace_indexer.writing.files import write_file, write_ids
from gradtrace_indexer.writing.shard_writer import ShardWriter

_COPIED_ROWS = 4096  # at a time

Rows = NDArray[np.int64]
_Parts = list[tuple[ShardEntry, Rows]]  # old shards, and which of their rows are copied


@dataclass(frozen=True)
class _Part:
    """What is left of one old stretch: `rows` are numbers inside its shards, ascending."""

    stretch: int
    rows: Rows


@dataclass
class _Piece:
    """A new stretch."""

    parts: list[_Part]
    size: int

    def is_stretch(self, current: Manifest) -> bool:
        """Whether it is an old stretch with all its rows, whose shards can be used as they are."""
        start, stop = current.stretches()[self.parts[0].stretch]
        return len(self.parts) == 1 and self.size == stop - start


def compact(path: str | Path, *, progress: bool = True) -> Manifest:
    """Publish a generation whose shards hold no deleted row, small neighbours merged as far as shard_rows allows.

    Answers stay the same, and so do ids. Shards that have nothing deleted and no small neighbour are used as they are.
    The space of the others is free once earlier generations are pruned. An interrupted call is gone on with.

    Returns:
        the manifest that is current now; where there is nothing to do, it is the one that was.

    Raises:
        StoreError: no index, another update unfinished or running, or a full disk.
        CorruptIndexError: a shard to be copied is damaged.
    """
    directory = Path(path)
    with updating(directory, "compact") as (current, pending):
        ids = read_row_ids(directory, current)
        pieces = _pieces(current, ids.live())
        if len(pieces) == len(current.stretches()) and all(piece.is_stretch(current) for piece in pieces):
            return current
        if pending is None:
            pending = _begun(directory, current, ids)
        return publish(directory, _with_shards(directory, current, pending, pieces, progress))


def _pieces(current: Manifest, live: NDArray[np.bool_]) -> list[_Piece]:
    """The new stretches: neighbours are merged while they fit into shard_rows."""
    pieces: list[_Piece] = []
    for number, (start, stop) in enumerate(current.stretches()):
        rows = np.flatnonzero(live[start:stop])
        if not len(rows):
            continue
        if not pieces or pieces[-1].size + len(rows) > current.shard_rows:
            pieces.append(_Piece([], 0))
        pieces[-1].parts.append(_Part(number, rows))
        pieces[-1].size += len(rows)
    return pieces


def _begun(directory: Path, current: Manifest, ids: RowIds) -> Manifest:
    """Commit the next generation without shards."""
    left = ids.live_ids()
    begun = successor(current, "compact", rows=len(left), deleted=None, shards=[])
    if len(left) < ids.rows:
        entry = write_ids(directory, f"row_ids/{begun.generation}.ids", left)
        begun = begun.model_copy(update={"row_ids": entry})
    return save_pending(directory, begun)


def _with_shards(
    directory: Path, current: Manifest, manifest: Manifest, pieces: list[_Piece], progress: bool
) -> Manifest:
    """Copy the shards that the unfinished generation does not name yet, committing each."""
    done = {(shard.checkpoint, shard.start) for shard in manifest.shards}
    starts = list(accumulate((piece.size for piece in pieces), initial=0))
    old = sorted(current.shards, key=lambda shard: (shard.checkpoint, shard.start))
    stretches = len(current.stretches())
    total = len(current.checkpoints) * starts[-1]
    with tqdm(total=total, unit=" rows", desc="compact", disable=not progress) as bar:
        for checkpoint in range(len(current.checkpoints)):
            sources = old[checkpoint * stretches : (checkpoint + 1) * stretches]
            for piece, start in zip(pieces, starts, strict=False):
                if (checkpoint, start) not in done:
                    shard = _shard(directory, current, manifest, piece, sources, start)
                    manifest = save_pending(directory, with_shard(manifest, shard))
                bar.update(piece.size)
    return manifest


def _shard(
    directory: Path, current: Manifest, manifest: Manifest, piece: _Piece, sources: list[ShardEntry], start: int
) -> ShardEntry:
    """The shard of a new stretch; `sources` are the old ones at the same checkpoint."""
    checkpoint, stop = sources[0].checkpoint, start + piece.size
    if piece.is_stretch(current):
        return sources[piece.parts[0].stretch].model_copy(update={"start": start, "stop": stop})
    name = shard_name(manifest, checkpoint, start)
    parts = [(sources[part.stretch], part.rows) for part in piece.parts]
    _refuse_damage(directory, [entry for entry, _ in parts])
    layout = ShardLayout(piece.size, tuple(manifest.levels), manifest.precision)
    columns = gathered([(directory / entry.columns.path, rows) for entry, rows in parts])
    return ShardEntry(
        checkpoint=checkpoint,
        start=start,
        stop=stop,
        rows=_copied(ShardWriter(directory, f"rows/{name}.rows", layout), _opened(directory, layout, "rows", parts)),
        columns=write_file(directory, f"columns/{name}.parquet", columns),
        representations=_representations(directory, manifest, checkpoint, start, piece.size, parts),
    )


def _representations(
    directory: Path, manifest: Manifest, checkpoint: int, start: int, size: int, parts: _Parts
) -> FileEntry | None:
    writer = representation_writer(directory, manifest, checkpoint, start, size)
    return None if writer is None else _copied(writer, _opened(directory, writer.layout, "representations", parts))


def _opened(
    directory: Path, layout: ShardLayout, kind: Literal["rows", "representations"], parts: _Parts
) -> Iterator[tuple[Shard, Rows]]:
    """The old shards' files of one kind, in turn, and what to copy of each."""
    for entry, rows in parts:
        file: FileEntry = getattr(entry, kind)
        yield Shard(directory / file.path, replace(layout, rows=entry.stop - entry.start)), rows


def _copied(writer: ShardWriter, sources: Iterable[tuple[Shard, Rows]]) -> FileEntry:
    with writer:
        for shard, rows in sources:
            for some in torch.from_numpy(rows).split(_COPIED_ROWS):
                writer.append_stored(shard, some)
        return writer.commit()


def _refuse_damage(directory: Path, entries: list[ShardEntry]) -> None:
    """A damaged value must not be copied: its new file would have a checksum that fits."""
    for file in (file for entry in entries for file in shard_files(entry)):
        if problem := check_file(directory, file, deep=True):
            raise CorruptIndexError(f"{directory} is damaged: {problem}. Restore the file, or rebuild the index")
