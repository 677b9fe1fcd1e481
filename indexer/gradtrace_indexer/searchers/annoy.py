"""Fill an Annoy forest with the rows of a store, straight into its file; the same bytes every time."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gradtrace.errors import StoreError
from gradtrace.search.annoy import import_annoy
from gradtrace.store.rows import RowStore
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.writing.row_blocks import row_blocks

_GROWTH = 1.5  # the file's size, with the trees' nodes, relative to that of the rows
_NODES_PER_TREE = 400


def annoy_parameters(trees: int, parameters: str) -> str:
    """The parameters of the searches, "search_k=..."; a default where none are given.

    Raises:
        StoreError: other parameters are given.
    """
    if parameters and not re.fullmatch(r"search_k=\d+", parameters):
        raise StoreError(f"annoy takes search_k=NUMBER, not {parameters!r}")
    return parameters or f"search_k={_NODES_PER_TREE * trees}"


def write_annoy(store: RowStore, trees: int, path: Path, progress: bool) -> None:
    """Write a forest over all rows.

    Raises:
        StoreError: too little space on the disk, or annoy is not installed.
    """
    columns = store.checkpoints * store.dimensions
    forest = import_annoy().AnnoyIndex(columns, "dot")
    needed, free = int(_GROWTH * 4 * store.rows * (columns + 6)), shutil.disk_usage(path.parent).free
    if needed > free:  # Annoy writes to a mapped file: a full disk would kill the process
        raise StoreError(f"{path} may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room")
    forest.set_seed(1)
    forest.on_disk_build(str(path))
    row = 0
    with progress_bar("searcher", store.rows, "rows", progress) as bar:
        for block in row_blocks(store):
            for vector in block:
                forest.add_item(row, vector)
                row += 1
            bar.update(len(block))
    forest.build(trees, n_jobs=1)
    forest.unload()
