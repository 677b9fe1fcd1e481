"""Approximate searchers of an index: writing their files, measuring their recall, and entering both in the manifest.

The same rows give the same bytes. A row's checkpoints are concatenated, and all rows scaled alike, to norms of at most
1.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import QueryError, StoreError
from gradtrace.index import Index
from gradtrace.methods import METHODS
from gradtrace.opening import open_index
from gradtrace.results.hits import Hit, InfluenceResult
from gradtrace.search.annoy import import_annoy
from gradtrace.search.by_name import SearcherName, open_searcher
from gradtrace.search.faiss import import_faiss, nested_indexes
from gradtrace.search.scored_rows import Floats
from gradtrace.store.index_files import check_file
from gradtrace.store.manifest import FileEntry, Manifest, RecallEntry, SearcherEntry
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.rows import RowStore
from gradtrace.task import Example, Task
from gradtrace_indexer.generations import publish, successor, updating
from gradtrace_indexer.held_out import held_out
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.writing.files import write_through

_K = 10  # hits at each end, whose recall is measured
_QUERIES = 64
_NODES_PER_TREE = 400  # that Annoy inspects for a query
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


def check_searcher(name: str) -> None:
    """Raises StoreError where this searcher cannot be built from any rows."""
    parsed = SearcherName.parse(name)
    if parsed.kind == "faiss":
        check_factory(parsed.argument)
    if parsed.kind == "annoy":
        import_annoy()


def set_searcher(path: str | Path, task: Task, name: str, *, device: str = "auto", progress: bool = True) -> Index:
    """Replace a finished index's searcher by the one of this name, and open the index with it.

    name: "progressive" for exact search alone, "faiss:FACTORY" or "annoy:TREES"; see docs/searchers.md. An undamaged
        searcher of that name and of the same rows stays.

    The same rows and libraries give the same bytes. The index is unchanged until the new searcher is published.

    Raises:
        StoreError: the index cannot be opened or written, or the searcher cannot be built.
    """
    directory = Path(path)
    check_searcher(name)
    with updating(directory, "set searcher") as (current, _):
        if current.basis.is_sparse and name != "progressive":
            raise StoreError(f"the rows of {directory} are sparse: their search is exact, and takes no {name!r}")
        if not _has(directory, current, name):
            index = open_index(directory, task, searcher="progressive", device=device)
            entry = None if name == "progressive" else _built(directory, index, name, progress)
            publish(directory, successor(current, "set searcher", searcher=entry))
    return open_index(directory, task, device=device)


def refresh_searcher(path: str | Path, task: Task, *, device: str = "auto", progress: bool = True) -> Index:
    """After an update, build the index's searcher again, if it has one; open the index."""
    entry = read_manifest(Path(path)).searcher
    return set_searcher(path, task, entry.name if entry else "progressive", device=device, progress=progress)


def _has(directory: Path, manifest: Manifest, name: str) -> bool:
    entry = manifest.searcher
    if entry is None:
        return name == "progressive"
    return entry.name == name and not manifest.searcher_is_stale() and not check_file(directory, entry.file, True)


def _built(directory: Path, index: Index, name: str, progress: bool) -> SearcherEntry:
    manifest, parsed = index.manifest, SearcherName.parse(name)
    file = f"searchers/{re.sub('[^A-Za-z0-9]+', '-', name)}.{manifest.generation + 1}"
    written, parameters = write_searcher(directory, file, RowStore(directory, manifest), parsed, progress)
    split, queries = held_out(index.task, _QUERIES, index.present)
    entry = SearcherEntry(
        name=name,
        parameters=parameters,
        library=f"annoy {version('annoy')}" if parsed.kind == "annoy" else f"faiss {import_faiss().__version__}",
        file=written,
        rows=manifest.rows_digest(),
        recall={},
        k=_K,
        queries=len(queries),
        split=split,
    )
    return entry.model_copy(update={"recall": _recall(directory, index, entry, queries)})


def write_searcher(
    directory: Path, file: str, store: RowStore, name: SearcherName, progress: bool
) -> tuple[FileEntry, str]:
    """Build an approximate searcher over all rows of a store; its file in `directory`, and its searches' parameters.

    Raises:
        StoreError: the searcher cannot be built, or the file cannot be written.
    """
    if name.kind == "annoy":
        trees = int(name.argument)
        parameters = name.parameters or f"search_k={_NODES_PER_TREE * trees}"
        if not re.fullmatch(r"search_k=\d+", parameters):
            raise StoreError(f"annoy takes search_k=NUMBER, not {parameters!r}")
        return write_through(directory, file, lambda path: write_annoy(store, trees, path, progress)), parameters
    index, parameters = filled_index(store, name.argument, name.parameters, progress)
    return write_through(directory, file, lambda path: save_index(index, path)), parameters


def _recall(directory: Path, index: Index, entry: SearcherEntry, queries: Sequence[Example]) -> dict[str, RecallEntry]:
    """The searcher's recall at both ends, by method."""
    manifest = index.manifest.model_copy(update={"searcher": entry})
    approximate = index.with_searcher(open_searcher(directory, manifest, RowStore(directory, manifest), None, "cpu"))
    recall, refused = {}, {}
    for method in index.methods:
        if not METHODS[method].compares_gradients:  # scores of other rows than the searcher's: always exact
            continue
        try:
            results = approximate.influence(queries, k=_K, method=method)
        except QueryError as error:  # not every method can explain every query
            refused[method] = str(error)
            continue
        if all(result.exact for result in results):  # scaled rows are searched exactly
            continue
        recall[method] = recall_of(index.influence(queries, k=_K, method=method), results)
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(method for method, other in refused.items() if other == reason)
        warnings.warn(f"no recall of the searcher was measured for {names}: {reason}", stacklevel=4)
    return recall


def recall_of(exact: Sequence[InfluenceResult], approximate: Sequence[InfluenceResult]) -> RecallEntry:
    """Mean share of the exact hits at each end that the approximate results have, over the same queries."""
    pairs = list(zip(exact, approximate, strict=True))
    return RecallEntry(
        top=mean_recall([(_scores(want.proponents), _scores(got.proponents)) for want, got in pairs]),
        bottom=mean_recall([(-_scores(want.opponents), -_scores(got.opponents)) for want, got in pairs]),
    )


def _scores(hits: Sequence[Hit]) -> Floats:
    return np.array([hit.score for hit in hits], dtype=np.float32)


def mean_recall(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    """Mean share of the best rows that were returned, from each query's (exact, approximate) best scores, both [k].

    Every row that scores at least as high as the last exact one counts, since rows with equal scores are
    interchangeable. Queries for which no row has a score of that sign are left out.
    """
    shares = [np.count_nonzero(got >= exact.min()) / len(exact) for exact, got in pairs if len(exact)]
    return round(float(np.mean(shares)), 4) if shares else 1.0


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
