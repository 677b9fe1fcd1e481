"""Fill a FAISS index with the rows of a store: factory strings checked, rows in blocks, the same bytes every time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.search.faiss import import_faiss, nested_indexes
from gradtrace.store.rows import RowStore
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.writing.row_blocks import row_blocks, sampled_rows

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


def filled_index(store: RowStore, factory: str, parameters: str, progress: bool) -> tuple[Any, str]:
    """The index of a factory string with all rows, and the parameters of its searches: defaults where none are given.

    Rows are read in blocks: only the index itself and, for training, a sample of the rows are in memory. A single
    thread is used, since graphs that several threads build differ from run to run.

    Raises:
        StoreError: the factory string or the parameters are invalid or known to answer wrongly, or faiss is missing.
    """
    faiss = import_faiss()
    with _one_thread(faiss):
        index = _made_index(faiss, factory, store.checkpoints * store.dimensions)
        parameters = parameters or _default_parameters(faiss, index)
        try:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
            if not index.is_trained:
                index.train(sampled_rows(store, _sample_size(faiss, index)))
            with progress_bar("searcher", store.rows, "rows", progress) as bar:
                for block in row_blocks(store):
                    index.add(block)
                    bar.update(len(block))
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


def _sample_size(faiss: Any, index: Any) -> int:
    inverted = faiss.try_extract_index_ivf(index)
    return _SAMPLES if inverted is None else _SAMPLES_PER_LIST * inverted.nlist


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """FAISS's message without its source location."""
    return str(error).rpartition("Error: ")[2] or str(error)
