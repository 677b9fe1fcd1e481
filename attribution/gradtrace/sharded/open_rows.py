"""The rows of an open index and their searcher: read here, or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from gradtrace.search.by_name import open_searcher
from gradtrace.search.searcher import DenseSearcher
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.searcher import ShardedSearcher
from gradtrace.sharded.stores import ShardedDenseRows, ShardedInvertedRows
from gradtrace.sparse.inverted_rows import InvertedRows
from gradtrace.sparse.store import SparseStore
from gradtrace.store.dense_rows import DenseRows
from gradtrace.store.manifest import Manifest
from gradtrace.store.rows import RowStore, representation_store, representations_manifest


class OpenRows(NamedTuple):
    """See `IndexContents`."""

    store: DenseRows | InvertedRows
    searcher: DenseSearcher | None
    representations: DenseRows | None
    shards: RowShards | None = None


def rows_here(
    directory: Path, manifest: Manifest, store: RowStore | SparseStore, searcher: str | None, device: torch.device
) -> OpenRows:
    """Raises as `open_searcher`."""
    dense = open_searcher(directory, manifest, store, searcher, device) if isinstance(store, RowStore) else None
    return OpenRows(store, dense, representation_store(directory, manifest))


def rows_in_shards(directory: Path, manifest: Manifest, shards: RowShards) -> OpenRows:
    representations = None
    if (of_representations := representations_manifest(manifest)) is not None:
        representations = ShardedDenseRows(directory, of_representations, shards, "representations")
    if manifest.basis.is_sparse:
        return OpenRows(ShardedInvertedRows(directory, manifest, shards), None, representations, shards)
    store = ShardedDenseRows(directory, manifest, shards, "gradients")
    return OpenRows(store, ShardedSearcher(shards), representations, shards)
