"""Which shards a generation needs, and what their files are called."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gradtrace.store.manifest import Manifest, ShardEntry
from gradtrace.store.shards import REPRESENTATION_PRECISION, ShardLayout
from gradtrace_indexer.writing.shard_writer import ShardWriter


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


def with_shard(manifest: Manifest, shard: ShardEntry) -> Manifest:
    shards = sorted([*manifest.shards, shard], key=lambda entry: (entry.checkpoint, entry.start))
    return manifest.model_copy(update={"shards": shards})
