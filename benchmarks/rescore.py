"""What rescoring gains and costs, and what percentiles cost: `python -m benchmarks.rescore mnist`.

The overlap is that of the index's top (and bottom) 10 with those of exact TracInCP, by the number of candidates taken
from either end of the compressed search.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.exact import exact_tracin
from gradtrace import Index, InfluenceResult, load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace.results import rescoring
from gradtrace.task import Example
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task

_K = 10
_SLOW = 20  # queries that are asked for percentiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run: Path = arguments.runs / arguments.dataset
    task = load_task(f"examples/{arguments.dataset}/task.py:TASK")
    checkpoints = load_checkpoints(run / "checkpoints")
    rows = np.sort(np.random.default_rng(0).choice(len(task.query), arguments.queries, replace=False))
    queries = fetch(task.query, rows.tolist())
    exact = exact_tracin(task, checkpoints, queries, run / f"exact-{arguments.queries}.npy")
    path = run / f"index-gauss-newton-{arguments.dimensions}-float16"
    index = build_index(task, checkpoints, path, dimensions=arguments.dimensions, precision="float16")
    print(
        f"| {arguments.dataset}, {index.rows:,} rows x {len(checkpoints)} checkpoints x "
        f"{index.manifest.basis.dimensions:,} dimensions, {arguments.queries} queries | top-10 overlap "
        "| bottom-10 overlap | ms a query | of these rescoring | ms a row |\n|---|--:|--:|--:|--:|--:|"
    )
    measure(index, queries, exact, "searched only")
    for candidates in (1, 2, 4):
        rescoring.CANDIDATES = candidates
        measure(index, queries, exact, f"rescored, {candidates} k candidates", rescore=True)
    measure(index, queries, exact, "searched, with layers", include=["layers"])
    measure(index, queries[:_SLOW], exact[:_SLOW], "searched, with percentiles", include=["percentiles"])


def measure(index: Index, queries: list[Example], exact: NDArray[np.float32], name: str, **options: object) -> None:
    """One line of the table: each query asked alone, medians."""
    spent, results = [], []
    for query in queries:
        started = time.perf_counter()
        answer = index.influence([query], k=_K, **options)
        whole, rescored = 1e3 * (time.perf_counter() - started), answer.timing["rescore"]
        results += answer
        spent.append((whole, rescored, rescored / max(1, results[-1].rows_rescored)))
    whole, rescored, per_row = np.median(spent, axis=0)
    top, bottom = (overlap(results, exact, sign) for sign in (-1, 1))
    print(f"| {name} | {top:.3f} | {bottom:.3f} | {whole:.1f} | {rescored:.1f} | {per_row:.2f} |", flush=True)


def overlap(results: list[InfluenceResult], exact: NDArray[np.float32], sign: int) -> float:
    """Mean share of the exact ten best (sign -1) or worst that were found."""
    ends = [result.proponents if sign < 0 else result.opponents for result in results]
    best = np.argsort(sign * exact, axis=1)[:, :_K]
    shares = [len({hit.row for hit in end} & set(own.tolist())) / _K for end, own in zip(ends, best, strict=True)]
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
