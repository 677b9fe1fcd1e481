"""Opening the shards of an index."""

from __future__ import annotations

from pathlib import Path

import torch

from gradtrace.errors import StoreError
from gradtrace.sharded.processes import ProcessShards
from gradtrace.sharded.ranges import row_ranges
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.server import ShardOpening
from gradtrace.store.manifest import Manifest


def open_shards(directory: Path, manifest: Manifest, count: int) -> RowShards:
    """Divide the rows of a generation among this number of processes; fewer where there are fewer rows.

    Raises:
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
    threads = max(1, torch.get_num_threads() // len(windows))
    # The paths are absolute: the process that others are forked from may have started elsewhere.
    openings = [ShardOpening(directory.absolute(), manifest, window, threads) for window in windows]
    return RowShards(windows, ProcessShards(openings))
