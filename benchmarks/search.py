"""Exact search at both ends, by each method, beside one matrix product over the same rows, in turns in one process:
`python -m benchmarks.search cifar10`.

The search reads the index on disk. The float32 product has every row in memory already, and its scores still have to be
searched for both ends, which is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.datasets import DATASETS, task_spec
from gradtrace import Index, Task, load_checkpoints, open_index
from gradtrace.basis import load_bases
from gradtrace.data.dataset import fetch
from gradtrace.methods import METHODS, Scoring
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import resolve_queries
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import SearchResult, exhaustive_scores
from gradtrace.store.manifest import Manifest
from gradtrace.store.rows import RowStore
from gradtrace_indexer.task_loading import load_task

Result = TypeVar("Result")
_WARM_UP, _BATCH, _BATCHES = 5, 16, 3


@dataclass(frozen=True)
class Asked:
    """A method's queries. vectors: [q, C, D];  row_scale: [rows] or None"""

    name: str
    vectors: Tensor
    checkpoints: list[int]
    row_scale: Tensor | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: the one that benchmarks.throughput built")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--methods", nargs="+", help="default: all that the index answers from its gradient rows")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    path = arguments.index or arguments.runs / arguments.dataset / "index-gauss-newton-1024-float16"
    index = open_index(path, load_task(task_spec(arguments.dataset)))
    store = index.contents.store
    print(
        f"| {arguments.dataset}: {store.rows:,} rows x {store.checkpoints} checkpoints x {store.dimensions:,} "
        f"dimensions, {index.manifest.precision}, {arguments.queries} queries, k = {arguments.k} | checkpoints "
        "| median, ms | 95 %, ms | batch of 16, ms a query | float32 product, ms | product / search | rows read beyond "
        "the first level | all scores, ms |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    names = arguments.methods or [name for name in index.methods if METHODS[name].compares_gradients]
    for name in names:
        compare(store, asked(index, name, arguments.queries + _WARM_UP), arguments.k)


def asked(index: Index, method: str, count: int) -> Asked:
    """The query vectors of random test examples at their own labels."""
    scoring: Scoring = index.scoring(method)
    rows = np.random.default_rng(0).choice(len(index.task.query), count, replace=False)
    queries = resolve_queries(index.contents.last_model, fetch(index.task.query, rows.tolist()), None)
    vectors, _ = scoring.query_vectors(queries)
    return Asked(method, vectors.cpu(), list(scoring.blocks), scoring.row_scale())


def compare(store: RowStore, queries: Asked, k: int) -> None:
    """Time the search, alone and in batches, and the product with the same rows and queries, in turn."""
    searcher, checkpoints = ProgressiveSearcher(store), queries.checkpoints
    matrix = torch.empty(store.rows, len(checkpoints) * store.dimensions)
    for start, block in store.blocks(checkpoints, 1024):
        matrix[start : start + len(block)] = block.flatten(1)
    search = partial(searcher.search, checkpoints=checkpoints, k=k, row_scale=queries.row_scale)
    alone, product, touched = [], [], []
    for query in queries.vectors:
        spent, (result,) = timed(partial(search, query[None]))
        alone.append(spent)
        touched.append(100 * result.rows_touched / store.rows)
        spent, scores = timed(partial(torch.mv, matrix, query.flatten()))
        product.append(spent)
        check(result, (scores if queries.row_scale is None else scores * queries.row_scale).numpy())
    batches = [queries.vectors[:_BATCH]] * (_BATCHES + 1)
    together = [timed(partial(search, batch))[0] / len(batch) for batch in batches][1:]
    scan = [timed(partial(exhaustive_scores, store, query[None], checkpoints))[0] for query in queries.vectors[:3]]
    alone, product = alone[_WARM_UP:], product[_WARM_UP:]
    print(
        f"| `{queries.name}` | {len(checkpoints)} | {np.median(alone):.1f} | {np.quantile(alone, 0.95):.1f} "
        f"| {np.median(together):.1f} | {np.median(product):.1f} | {np.median(product) / np.median(alone):.1f} "
        f"| {np.mean(touched):.1f} % | {np.median(scan):.0f} |",
        flush=True,
    )


def query_vectors(task: Task, path: Path, manifest: Manifest, checkpoints: Path, count: int) -> Tensor:
    """TracIn's query vectors of random test examples at their own labels, [count, C, D]."""
    examples = fetch(task.query, np.random.default_rng(0).choice(len(task.query), count, replace=False).tolist())
    (basis,) = load_bases(path, manifest)
    vectors = torch.empty(count, len(manifest.checkpoints), basis.dimensions)
    for position, checkpoint in enumerate(load_checkpoints(checkpoints)):
        model = GradientModel(task, checkpoint, torch.device("cpu"), [task.train[0], task.train[1]])
        vectors[:, position] = model.encode(basis, model.batch(examples))[0] * checkpoint.learning_rate
    return vectors


def check(result: SearchResult, scores: NDArray[np.float32]) -> None:
    """The search has found the ends of these scores, up to float32 rounding."""
    ascending, k = np.sort(scores), len(result.top.rows)
    ends: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]] = (
        (result.top.scores, ascending[::-1][:k]),
        (result.bottom.scores, ascending[:k]),
    )
    for searched, end in ends:
        if not np.allclose(searched, end, rtol=1e-4, atol=1e-5 * np.abs(scores).max()):
            sys.exit(f"the search found {searched}, the product {end}")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Milliseconds, and what the work returned."""
    started = time.perf_counter()
    result = work()
    return 1e3 * (time.perf_counter() - started), result


if __name__ == "__main__":
    main()
