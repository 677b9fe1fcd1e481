"""Searchers side by side on one index: `python -m benchmarks.searchers cifar10`.

Each is built and then asked in a process of its own: the file it needs, the memory that is its own (mapped files are
not), the time of a query, and its recall@k at both ends against exact search. The float32 product holds all rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.search import query_vectors, timed
from gradtrace.search.by_name import SearcherName, open_searcher
from gradtrace.search.scored_rows import SearchResult, rank
from gradtrace.store.manifest import SearcherEntry
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.rows import RowStore
from gradtrace_indexer.searchers import mean_recall, write_searcher
from gradtrace_indexer.task_loading import load_task

PRODUCT = "float32 product"
SEARCHERS = (
    "progressive",
    PRODUCT,
    "faiss:Flat",
    "faiss:HNSW32",
    "faiss:HNSW32,SQfp16",
    "faiss:IVF1024,Flat",
    "annoy:50",
)
_WARM_UP = 5

Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """One kind of search: with these checkpoints, among these rows ([rows] bool; None: all)."""

    name: str
    checkpoints: list[int]
    allowed: NDArray[np.bool_] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--index", type=Path, help="default: the one that benchmarks.throughput built")
    parser.add_argument("--searchers", nargs="+", default=SEARCHERS)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run = arguments.runs / arguments.dataset
    path = arguments.index or run / "index-gauss-newton-1024-float16"
    manifest = read_manifest(path)
    task = load_task(f"examples/{arguments.dataset}/task.py:TASK")
    vectors = query_vectors(task, path, manifest, run / "checkpoints", arguments.queries + _WARM_UP)
    last = len(manifest.checkpoints) - 1
    labels = RowStore(path, manifest).columns(last)["label"]
    everything = list(range(last + 1))
    cases = [
        Case("all checkpoints", everything),
        Case("last checkpoint", [last]),
        Case("one label", everything, labels == labels[0]),
    ]
    print(f"{arguments.dataset}: {arguments.queries} queries, k = {arguments.k}\n")
    report(path, vectors, cases, arguments.k, arguments.searchers)


def report(path: Path, vectors: Tensor, cases: Sequence[Case], k: int, searchers: Sequence[str] = SEARCHERS) -> None:
    """Print a table over an index directory for query vectors [q, checkpoints, dimensions], the first of them warm-up.

    The searchers' files go to a temporary directory.
    """
    print("| searcher | search | build, s | file, MB | memory, MB | median, ms | 95 %, ms | recall: top | bottom |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    exact = _apart(_asked, path, path, None, "progressive", vectors, cases, k)
    for name in searchers:
        with tempfile.TemporaryDirectory() as scratch:
            entry, seconds = _apart(_built, path, Path(scratch), name)
            asked = exact if name == "progressive" else _apart(_asked, path, scratch, entry, name, vectors, cases, k)
        size = f"{seconds:,.0f} | {entry.file.bytes / 1e6:,.0f}" if entry else " | "
        for number, case in enumerate(cases):
            times, found = asked.times[number], asked.found[number]
            figures = f"{np.median(times):.2f} | {np.quantile(times, 0.95):.2f} | {_recall(exact.found[number], found)}"
            print(f"| {name} | {case.name} | {size} | {asked.memory:,.0f} | {figures} |", flush=True)


def _apart(work: Callable[..., Result], *arguments: Any) -> Result:
    """What the work returns, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _built(path: Path, scratch: Path, name: str) -> tuple[SearcherEntry | None, float]:
    """What a manifest says of the searcher, and the seconds that its build took."""
    if name in ("progressive", PRODUCT):
        return None, 0.0
    manifest, started = read_manifest(path), time.perf_counter()
    file, parameters = write_searcher(scratch, "searcher", RowStore(path, manifest), SearcherName.parse(name), False)
    seconds = time.perf_counter() - started
    rows = manifest.rows_digest()
    return SearcherEntry(
        name=name, parameters=parameters, library="", file=file, rows=rows, recall={}, k=0, queries=0, split="query"
    ), seconds


@dataclass
class Asked:
    """Per case the queries' times in ms and results, and the memory of the searcher in MB."""

    times: list[list[float]]
    found: list[list[SearchResult]]
    memory: float


def _asked(
    path: Path, scratch: Path, entry: SearcherEntry | None, name: str, vectors: Tensor, cases: Sequence[Case], k: int
) -> Asked:
    manifest = read_manifest(path).model_copy(update={"searcher": entry})
    store = RowStore(path, manifest)
    before = _own_memory()
    searcher = Product(store) if name == PRODUCT else open_searcher(Path(scratch), manifest, store, name, "cpu")
    asked = Asked([], [], 0.0)
    for case in cases:
        search = partial(searcher.search, checkpoints=case.checkpoints, k=k, allowed=case.allowed)
        answers = [timed(partial(search, query[None, case.checkpoints])) for query in vectors][_WARM_UP:]
        asked.times.append([spent for spent, _ in answers])
        asked.found.append([result for _, (result,) in answers])
    asked.memory = _own_memory() - before
    return asked


class Product:
    """Every row's score by one matrix product over rows in memory, then both ends exactly."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._rows = torch.empty(store.checkpoints, store.rows, store.dimensions)
        for start, block in store.blocks(range(store.checkpoints), 4096):
            self._rows[:, start : start + len(block)] = block.transpose(0, 1)

    def search(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        (query,) = queries
        parts = [torch.mv(self._rows[c], part) for c, part in zip(checkpoints, query, strict=True)]
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        some = torch.stack(parts).sum(0)[rows]
        ends = torch.cat([some.topk(2 * k).indices, some.topk(2 * k, largest=False).indices]).unique().numpy()
        ranking = rank(self._store, query.double().numpy(), checkpoints, rows[ends], k)
        return [SearchResult(*ranking, exact=True, rows_touched=len(rows), rows_searched=len(rows))]


def _recall(exact: Sequence[SearchResult], found: Sequence[SearchResult]) -> str:
    pairs = list(zip(exact, found, strict=True))
    top = mean_recall([(want.top.scores, got.top.scores) for want, got in pairs])
    bottom = mean_recall([(-want.bottom.scores, -got.bottom.scores) for want, got in pairs])
    return f"{top:.3f} | {bottom:.3f}" + (" (exact)" if all(got.exact for got in found) else "")


def _own_memory() -> float:
    """MB of this process that no file backs."""
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1e3


if __name__ == "__main__":
    main()
