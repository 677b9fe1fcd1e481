"""Compact an index: shards without their deleted rows, and small ones merged. No value is computed or rounded again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.sparse.segments import Segment
from gradtrace.sparse.store import segment_layout
from gradtrace.store.index_files import check_file
from gradtrace.store.manifest import FileEntry, Manifest, SegmentSizes, ShardEntry, shard_files
from gradtrace.store.regular_files import regular_path
from gradtrace.store.row_ids import read_row_ids
from gradtrace.store.shards import Shard, ShardLayout
from gradtrace_indexer.generations import publish, save_pending, successor, updating
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.writing.columns import gathered
from gradtrace_indexer.writing.files import write_file, write_ids
from gradtrace_indexer.writing.segment_file import SegmentWriter
from gradtrace_indexer.writing.shard_writer import ShardWriter, representation_writer, shard_name, with_shards

_COPIED_ROWS = 4096  # at a time

Rows = NDArray[np.int64]
_Sources = list[tuple[ShardEntry, Rows]]  # old shards at one checkpoint, and the positions in each that are copied


@dataclass
class _NewStretch:
    """Old stretches that are merged: the number of each, and its live rows, by their ascending positions in it."""

    live: dict[int, Rows]
    start: int

    @property
    def rows(self) -> int:
        return sum(map(len, self.live.values()))

    def is_unchanged(self, current: Manifest) -> bool:
        """Whether it is one old stretch with all its rows, whose shards can be used as they are."""
        start, stop = current.stretches()[next(iter(self.live))]
        return len(self.live) == 1 and self.rows == stop - start


def compact(path: str | Path, *, progress: bool = True) -> Manifest:
    """Publish a generation whose shards hold no deleted row, small neighbours merged as far as shard_rows allows.

    Answers stay the same, and so do ids. Shards without deleted rows and small neighbours are used as they are; the
    space of the others is free once earlier generations are pruned. Run again after an interruption, it resumes.
    Returns the current manifest, unchanged where there was nothing to do.

    Raises:
        StoreError: no index, another update unfinished or running, or a full disk.
        CorruptIndexError: a shard to be copied is damaged.
    """
    directory = Path(path)
    with updating(directory, "compact") as (current, pending):
        ids = read_row_ids(directory, current)
        stretches = _merged(current, ids.live())
        if len(stretches) == len(current.stretches()) and all(new.is_unchanged(current) for new in stretches):
            return current
        if pending is None:
            live = ids.live_ids()
            pending = successor(current, "compact", rows=len(live), deleted=None, shards=[])
            if len(live) < ids.rows:
                entry = write_ids(directory, f"row_ids/{pending.generation}.ids", live)
                pending = pending.model_copy(update={"row_ids": entry})
            pending = save_pending(directory, pending)
        return publish(directory, _with_shards(directory, current, pending, stretches, progress))


def _merged(current: Manifest, live: NDArray[np.bool_]) -> list[_NewStretch]:
    """The new stretches: neighbours are merged while they fit into shard_rows."""
    stretches: list[_NewStretch] = []
    for number, (start, stop) in enumerate(current.stretches()):
        rows = np.flatnonzero(live[start:stop])
        if not len(rows):
            continue
        if not stretches or stretches[-1].rows + len(rows) > current.shard_rows:
            stretches.append(_NewStretch({}, stretches[-1].start + stretches[-1].rows if stretches else 0))
        stretches[-1].live[number] = rows
    return stretches


def _with_shards(
    directory: Path, current: Manifest, manifest: Manifest, stretches: list[_NewStretch], progress: bool
) -> Manifest:
    """Copy the shards that the unfinished generation does not name yet, committing each."""
    written = {(shard.checkpoint, shard.start) for shard in manifest.shards}
    old = {(shard.checkpoint, shard.start): shard for shard in current.shards}
    starts = [start for start, _ in current.stretches()]
    with progress_bar("compact", len(current.checkpoints) * manifest.rows, " rows", progress) as bar:
        for checkpoint in range(len(current.checkpoints)):
            for stretch in stretches:
                if (checkpoint, stretch.start) not in written:
                    sources = [(old[checkpoint, starts[number]], rows) for number, rows in stretch.live.items()]
                    if stretch.is_unchanged(current):
                        span = {"start": stretch.start, "stop": stretch.start + stretch.rows}
                        shard = sources[0][0].model_copy(update=span)
                    else:
                        shard = _copied_shard(directory, manifest, stretch.start, sources)
                    manifest = save_pending(directory, with_shards(manifest, [shard]))
                bar.update(stretch.rows)
    return manifest


def _copied_shard(directory: Path, manifest: Manifest, start: int, sources: _Sources) -> ShardEntry:
    """A new shard with these rows of old ones, at the same checkpoint."""
    checkpoint, size = sources[0][0].checkpoint, sum(len(rows) for _, rows in sources)
    name = shard_name(manifest, checkpoint, start)
    for source in (file for entry, _ in sources for file in shard_files(entry)):
        if problem := check_file(directory, source, deep=True):  # its copy would have a checksum that fits
            raise CorruptIndexError(f"{directory} is damaged: {problem}. Restore the file, or rebuild the index")
    file, segment = _copied_rows(directory, manifest, f"rows/{name}.rows", size, sources)
    represented = representation_writer(directory, manifest, checkpoint, start, size)
    columns = gathered(directory, sources)
    return ShardEntry(
        checkpoint=checkpoint,
        start=start,
        stop=start + size,
        rows=file,
        representations=represented and _copied(directory, represented, "representations", sources),
        columns=write_file(directory, f"columns/{name}.parquet", columns),
        segment=segment,
    )


def _copied_rows(
    directory: Path, manifest: Manifest, name: str, size: int, sources: _Sources
) -> tuple[FileEntry, SegmentSizes | None]:
    if not manifest.basis.is_sparse:
        layout = ShardLayout(size, tuple(manifest.levels), manifest.precision)
        return _copied(directory, ShardWriter(directory, name, layout), "rows", sources), None
    writer = SegmentWriter(directory, name)
    for entry, rows in sources:
        writer.append_stored(Segment(regular_path(directory, entry.rows.path), segment_layout(entry)), rows)
    return writer.commit()


def _copied(
    directory: Path, writer: ShardWriter, kind: Literal["rows", "representations"], sources: _Sources
) -> FileEntry:
    """The file of one kind of a new shard."""
    with writer:
        for entry, rows in sources:
            file: FileEntry = getattr(entry, kind)
            shard = Shard(regular_path(directory, file.path), replace(writer.layout, rows=entry.stop - entry.start))
            for block in torch.from_numpy(rows).split(_COPIED_ROWS):
                writer.append_stored(shard, block)
        return writer.commit()
