"""Opening the shards of an index."""

from __future__ import annotations

from pathlib import Path

import torch

from gradtrace.errors import StoreError
from gradtrace.sharded.processes import ProcessShards
from gradtrace.sharded.ranges import row_ranges
from gradtrace.sharded.ray_actors import RayShards
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.server import ShardOpening
from gradtrace.store.manifest import Manifest


def open_shards(directory: Path, manifest: Manifest, count: int, ray: str | None = None) -> RowShards:
    """Divide the rows of a generation among this number of shards; fewer where there are fewer rows.

    ray: address of the Ray cluster whose actors they are, see `RayShards`; None: processes of this machine

    Raises:
        MissingLibraryError: Ray is not installed.
        StoreError: the index has an approximate searcher.
        CorruptIndexError: a shard cannot read its files.
        ShardLostError: a shard ended while it was opened.
    """
    if manifest.searcher is not None and not manifest.searcher_is_stale():
        raise StoreError(
            f"{directory} has the approximate searcher {manifest.searcher.name}, and shards search exactly: open it "
            'with searcher="progressive", or go back to exact search by `gradtrace build ... --searcher progressive`'
        )
    windows = row_ranges(manifest.rows, manifest.stretches(), count)
    on_one_machine = ray in (None, "local")  # else as many threads as here, on each
    threads = max(1, torch.get_num_threads() // (len(windows) if on_one_machine else 1))
    # Other processes may have started in other folders. Where the files may be copies, each shard verifies its own.
    openings = [ShardOpening(directory.absolute(), manifest, window, threads, ray is not None) for window in windows]
    return RowShards(windows, ProcessShards(openings) if ray is None else RayShards(openings, ray))
