"""Give an index an approximate searcher: write its file, measure its recall, and enter both in the manifest."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gradtrace.errors import QueryError
from gradtrace.index import Index
from gradtrace.methods import METHODS
from gradtrace.opening import open_index
from gradtrace.results.hits import Hit, InfluenceResult
from gradtrace.search.annoy import import_annoy
from gradtrace.search.by_name import SearcherName, open_searcher
from gradtrace.search.faiss import import_faiss
from gradtrace.search.scored_rows import Floats
from gradtrace.store.index_files import check_file
from gradtrace.store.manifest import FileEntry, Manifest, RecallEntry, SearcherEntry, read_manifest
from gradtrace.store.rows import RowStore
from gradtrace.task import Example, Task
from gradtrace_indexer.generations import publish, successor, updating
from gradtrace_indexer.held_out import held_out
from gradtrace_indexer.searchers.annoy import annoy_parameters, write_annoy
from gradtrace_indexer.searchers.faiss import check_factory, filled_index, save_index
from gradtrace_indexer.writing.files import write_through

_K = 10
_QUERIES = 64


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
        parameters = annoy_parameters(trees, name.parameters)
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
            found = approximate.influence(queries, k=_K, method=method)
        except QueryError as error:  # not every method can explain every query
            refused[method] = str(error)
            continue
        if all(result.exact for result in found):  # scaled rows are searched exactly
            continue
        recall[method] = recall_of(index.influence(queries, k=_K, method=method), found)
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(method for method, other in refused.items() if other == reason)
        warnings.warn(f"no recall of the searcher was measured for {names}: {reason}", stacklevel=4)
    return recall


def recall_of(exact: Sequence[InfluenceResult], found: Sequence[InfluenceResult]) -> RecallEntry:
    """Mean share of the exact hits at each end that were found, over the same queries."""
    pairs = list(zip(exact, found, strict=True))
    return RecallEntry(
        top=mean_recall([(_scores(want.proponents), _scores(got.proponents)) for want, got in pairs]),
        bottom=mean_recall([(-_scores(want.opponents), -_scores(got.opponents)) for want, got in pairs]),
    )


def _scores(hits: Sequence[Hit]) -> Floats:
    return np.array([hit.score for hit in hits], dtype=np.float32)


def mean_recall(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    """Mean share of the best rows that were found, from the (exact, found) best scores of each query, both [k].

    Every row that scores at least as high as the last exact one counts, since rows with equal scores are
    interchangeable. Queries for which no row has a score of that sign are left out.
    """
    shares = [np.count_nonzero(found >= exact.min()) / len(exact) for exact, found in pairs if len(exact)]
    return round(float(np.mean(shares)), 4) if shares else 1.0
