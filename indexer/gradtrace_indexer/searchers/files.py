"""The files of approximate searchers, filled with the rows of a store: the same rows give the same bytes.

A row's checkpoints are concatenated, and all rows scaled alike, to norms of at most 1.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import StoreError
from gradtrace.search.annoy import import_annoy
from gradtrace.search.faiss import import_faiss, nested_indexes
from gradtrace.store.rows import RowStore
from gradtrace_indexer.progress import progress_bar

_BLOCK_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 30
_GROWTH = 1.5  # the file's size, with the trees' nodes, relative to that of the rows
_SAMPLES_PER_LIST = 64  # rows that train an inverted list's centroid; FAISS asks for 39 at least
_SAMPLES = 65_536  # rows that train what has no inverted lists
_RABITQ_COLUMNS = 2048
_EF_SEARCH = 128

# Factory strings that FAISS accepts and answers wrongly: the reason and the remedy of the first match are given.
_REFUSED = (
    (r"(^|,)IDMap", "the ids of the rows are their positions already: leave IDMap out"),
    (r"(^|,)L2norm", "it makes all rows equally long, so that cosines are found, not inner products: leave L2norm out"),
    (r"(^|,)(PCA|ITQ)", "it subtracts the mean, which changes the order of inner products: use OPQ or RR instead"),
    (r"IVF.*RaBitQ", "it finds hardly any of the largest inner products: take RaBitQ without IVF, or another code"),
    (r"^B(Flat|IVF|HNSW|Hash)", "it is for vectors of bits: take the kind without the B"),
)


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
    for row, vector in enumerate(chain.from_iterable(_blocks(store, progress))):
        forest.add_item(row, vector)
    forest.build(trees, n_jobs=1)
    forest.unload()


def filled_index(store: RowStore, factory: str, parameters: str, progress: bool) -> tuple[Any, str]:
    """The index of a factory string with all rows, and the parameters of its searches: defaults where none are given.

    Rows are read in blocks: only the index itself and, for training, a sample of the rows are in memory. A single
    thread is used, since graphs that several threads build differ from run to run.

    Raises:
        StoreError: the factory string or the parameters are invalid or known to answer wrongly, or faiss is missing.
    """
    faiss = import_faiss()
    with ExitStack() as afterwards:
        afterwards.callback(faiss.omp_set_num_threads, faiss.omp_get_max_threads())
        faiss.omp_set_num_threads(1)
        index = _made_index(faiss, factory, store.checkpoints * store.dimensions)
        parameters = parameters or _default_parameters(faiss, index)
        try:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
            if not index.is_trained:
                inverted = faiss.try_extract_index_ivf(index)
                index.train(_sample(store, _SAMPLES if inverted is None else _SAMPLES_PER_LIST * inverted.nlist))
            for block in _blocks(store, progress):
                index.add(block)
        except RuntimeError as error:
            raise StoreError(f"faiss:{factory};{parameters} cannot be built: {_reason(error)}") from error
    return index, parameters


def save_index(index: Any, path: Path) -> None:
    """Raises StoreError where the file cannot be written."""
    try:
        import_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise StoreError(
            f"{path} could not be written: {_reason(error)}; free some space, then run it again"
        ) from error


def check_factory(factory: str) -> None:
    """Raises StoreError for a factory string that is refused for any rows, or where faiss is not installed."""
    import_faiss()
    for pattern, reason in _REFUSED:
        if re.search(pattern, factory):
            raise StoreError(f"faiss:{factory} is refused: {reason}")


def _made_index(faiss: Any, factory: str, columns: int) -> Any:
    """An empty index for large inner products."""
    check_factory(factory)
    if factory.startswith("RaBitQfs") and columns > _RABITQ_COLUMNS:
        raise StoreError(
            f"faiss:{factory} is refused: it answers wrongly above {_RABITQ_COLUMNS:,} columns, and checkpoints x "
            f"dimensions are {columns:,}: use RaBitQ, or fewer dimensions"
        )
    try:
        index = faiss.index_factory(columns, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise StoreError(
            f"faiss cannot make {factory!r} for inner products of {columns:,} columns: {_reason(error)}; take another "
            "factory string, such as HNSW32,SQfp16"
        ) from error
    for part in nested_indexes(index):
        if part.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise StoreError(
                f"faiss:{factory} is refused: faiss {faiss.__version__} makes a {type(part).__name__} of it that looks "
                "for small distances, not for large inner products; use HNSW32,SQfp16 or an IVF kind"
            )
    return index


def _default_parameters(faiss: Any, index: Any) -> str:
    """FAISS's own defaults are efSearch=16 and nprobe=1; the recall of these is in docs/searchers.md."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        return f"nprobe={round(inverted.nlist**0.5)}"
    return f"efSearch={_EF_SEARCH}" if any(isinstance(part, faiss.IndexHNSW) for part in nested_indexes(index)) else ""


def _reason(error: RuntimeError) -> str:
    """FAISS's message without its source location."""
    return str(error).rpartition("Error: ")[2] or str(error)


def _blocks(store: RowStore, progress: bool) -> Iterator[NDArray[np.float32]]:
    """All rows in order, [b, C * D], 64 MB at a time."""
    factor = _factor(store)
    with progress_bar("searcher", store.rows, " rows", progress) as bar:
        for _, block in store.blocks(range(store.checkpoints), max(1, _BLOCK_BYTES // _row_bytes(store))):
            yield block.flatten(1).mul_(factor).numpy()
            bar.update(len(block))


def _sample(store: RowStore, count: int) -> NDArray[np.float32]:
    """At most `count` rows and 1 GB, drawn with a fixed seed. [<= count, C * D]."""
    count = min(count, store.rows, max(1, _SAMPLE_BYTES // _row_bytes(store)))
    chosen = np.sort(np.random.default_rng(0).choice(store.rows, count, replace=False))
    rows: NDArray[np.float32] = np.empty((count, store.checkpoints * store.dimensions), np.float32)
    size = max(1, _BLOCK_BYTES // _row_bytes(store))
    for start in range(0, count, size):
        block = store.gather(range(store.checkpoints), chosen[start : start + size])
        rows[start : start + size] = block.flatten(1).mul_(_factor(store)).numpy()
    return rows


def _row_bytes(store: RowStore) -> int:
    return 4 * store.checkpoints * store.dimensions


def _factor(store: RowStore) -> float:
    """A power of two, so that scaling rounds nothing and keeps every order; float16 codes can then not overflow."""
    squares = sum(store.norms(checkpoint).astype(np.float64) ** 2 for checkpoint in range(store.checkpoints))
    longest = math.sqrt(np.max(squares, initial=0))
    return 2.0 ** -math.frexp(longest)[1]
