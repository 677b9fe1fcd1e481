"""Exact search at both ends beside one matrix product over the same rows: `python -m benchmarks.search cifar10`.

The search reads the index on disk. The float32 product has every row in memory already, and its scores still have to be
searched for both ends, which is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.datasets import DATASETS, task_spec
from gradtrace import Task, load_checkpoints
from gradtrace.basis import load_bases
from gradtrace.data.dataset import fetch
from gradtrace.models.gradient_model import GradientModel
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import SearchResult, exhaustive_scores
from gradtrace.store.manifest import Manifest, read_manifest
from gradtrace.store.rows import RowStore
from gradtrace_indexer.task_loading import load_task

Result = TypeVar("Result")
_WARM_UP, _SCANS = 5, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: the one that benchmarks.throughput built")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run = arguments.runs / arguments.dataset
    path = arguments.index or run / "index-spectral-1024-float16"
    manifest = read_manifest(path)
    task = load_task(task_spec(arguments.dataset))
    vectors = query_vectors(task, path, manifest, run / "checkpoints", arguments.queries + _WARM_UP)
    store = RowStore(path, manifest)
    print(
        f"| {arguments.dataset}: {store.rows:,} rows, {store.dimensions:,} dimensions, {manifest.precision}, "
        f"{arguments.queries} queries, k = {arguments.k} | median, ms | 95 %, ms | times as fast as the product "
        "| rows read beyond the first level |\n|---|--:|--:|--:|--:|"
    )
    for checkpoints in (list(range(store.checkpoints)), [store.checkpoints - 1]):
        compare(store, vectors[:, checkpoints].contiguous(), checkpoints, arguments.k)


def query_vectors(task: Task, path: Path, manifest: Manifest, checkpoints: Path, count: int) -> Tensor:
    """TracIn's query vectors of random test examples at their own labels, [count, C, D]."""
    examples = fetch(task.query, np.random.default_rng(0).choice(len(task.query), count, replace=False).tolist())
    (basis,) = load_bases(path, manifest)
    vectors = torch.empty(count, len(manifest.checkpoints), basis.dimensions)
    for position, checkpoint in enumerate(load_checkpoints(checkpoints)):
        model = GradientModel(task, checkpoint, torch.device("cpu"), [task.train[0], task.train[1]])
        vectors[:, position] = model.encode(basis, model.batch(examples))[0] * checkpoint.learning_rate
    return vectors


def compare(store: RowStore, vectors: Tensor, checkpoints: list[int], k: int) -> None:
    """Time the search, the product and the scan with the same rows and queries, in turn."""
    searcher = ProgressiveSearcher(store)
    matrix = torch.cat([block.flatten(1) for _, block in store.blocks(checkpoints, 1024)])
    search, product, touched = [], [], []
    for query in vectors:
        spent, (result,) = timed(partial(searcher.search, query[None], checkpoints, k))
        search.append(spent)
        touched.append(100 * result.rows_touched / store.rows)
        spent, scores = timed(partial(torch.mv, matrix, query.flatten()))
        product.append(spent)
        check(result, scores.numpy())
    scan = [timed(partial(exhaustive_scores, store, query[None], checkpoints))[0] for query in vectors[:_SCANS]]
    for what, times, share in (
        ("search, both ends", search[_WARM_UP:], f"{np.mean(touched):.1f} %"),
        ("float32 product, in memory", product[_WARM_UP:], "100 %"),
        ("scan of the index", scan, "100 %"),
    ):
        ratio = np.median(product[_WARM_UP:]) / np.median(times)
        figures = f"{np.median(times):.2f} | {np.quantile(times, 0.95):.2f} | {ratio:.1f} | {share}"
        print(f"| {len(checkpoints)} of {store.checkpoints} checkpoints: {what} | {figures} |")


def check(result: SearchResult, scores: NDArray[np.float32]) -> None:
    """The search has found the ends of these scores, up to float32 rounding."""
    k, ascending = len(result.top.rows), np.sort(scores)
    for found, end in ((result.top.scores, ascending[::-1][:k]), (result.bottom.scores, ascending[:k])):
        if not np.allclose(found, end, rtol=1e-4, atol=1e-5 * np.abs(scores).max()):
            sys.exit(f"the search found {found}, the product {end}")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Milliseconds, and what the work returned."""
    started = time.perf_counter()
    result = work()
    return 1e3 * (time.perf_counter() - started), result


if __name__ == "__main__":
    main()
