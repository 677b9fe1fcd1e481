"""Exact search over a million gradient rows: `python -m benchmarks.million cifar10 --out DIR`.

The rows are those of an index, and mixtures of two of them, cos t row + sin t other row with t drawn evenly from a
right angle and the same at every checkpoint: their second moments, and so the spectrum that the search lives by, are
those of the real rows. Queries are gradients of test examples. DIR keeps the index and queries.npy, float32 [q, C, D].
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.derived import derived
from benchmarks.memory import peak
from benchmarks.search import query_vectors
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import SearchResult, exhaustive_scores
from gradtrace.store.manifest import Manifest, Precision
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.rows import RowStore
from gradtrace_indexer.task_loading import load_task

_BLOCK = 8192
_BATCHES = (1, 16, 64)
_CHECKED = 16  # queries whose answers are compared with those of a scan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[2], help="positions in the source; default: 2")
    parser.add_argument("--precision", choices=["float16", "int8", "int4"], default="float16")
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--source", type=Path, help="default: the index that benchmarks.throughput built")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only-search", action="store_true", help="what was made before; nothing else is loaded")
    arguments = parser.parse_args()
    if not arguments.only_search:
        make(arguments)
    queries = torch.from_numpy(np.load(arguments.out / "queries.npy"))
    measure(arguments.out, queries, arguments.k)


def make(arguments: argparse.Namespace) -> None:
    run = arguments.runs / arguments.dataset
    path = arguments.source or run / "index-gauss-newton-1024-float16"
    manifest = read_manifest(path)
    started = time.perf_counter()
    mix(path, manifest, arguments.out, arguments.checkpoints, arguments.rows, arguments.precision)
    print(f"{arguments.rows:,} rows mixed and written in {time.perf_counter() - started:.0f} s\n", flush=True)
    task = load_task(f"examples/{arguments.dataset}/task.py:TASK")
    queries = query_vectors(task, path, manifest, run / "checkpoints", arguments.queries)
    np.save(arguments.out / "queries.npy", queries[:, arguments.checkpoints].numpy())


def mix(path: Path, manifest: Manifest, out: Path, checkpoints: Sequence[int], rows: int, precision: Precision) -> None:
    """The rows of the source, then mixtures of two that are drawn at random."""
    source = RowStore(path, manifest)
    draw = np.random.default_rng(0)
    pairs = torch.from_numpy(draw.integers(0, source.rows, (2, rows)))
    angles = torch.from_numpy(draw.uniform(0, math.pi / 2, rows).astype(np.float32))
    pairs[:, : source.rows], angles[: source.rows] = torch.arange(min(rows, source.rows)), 0

    def blocks(checkpoint: int) -> Iterable[Tensor]:
        real = torch.cat([block[:, 0] for _, block in source.blocks([checkpoint], _BLOCK)])
        for start in range(0, rows, _BLOCK):
            some = slice(start, start + _BLOCK)
            one, other = real[pairs[0, some]], real[pairs[1, some]]
            yield one.mul_(angles[some, None].cos()).add_(other.mul_(angles[some, None].sin()))

    derived(source, manifest, out, source.dimensions, precision, checkpoints, rows, blocks)


def measure(path: Path, queries: Tensor, k: int) -> None:
    manifest = read_manifest(path)
    store = RowStore(path, manifest)
    checkpoints = list(range(store.checkpoints))
    started = time.perf_counter()
    searcher = ProgressiveSearcher(store)
    opened = time.perf_counter() - started
    results = searcher.search(queries, checkpoints, k)  # also warms up
    size = sum(entry.rows.bytes for entry in manifest.shards)
    print(
        f"| {store.rows:,} rows x {store.checkpoints} checkpoints x {store.dimensions:,} dimensions, "
        f"{manifest.precision}, {size / 1e9:.2f} GB, k = {k} | |\n|---|--:|"
    )
    print(f"| searcher ready after, s | {opened:.2f} |")
    for batch in _BATCHES:
        times = []
        for start in range(0, len(queries) - batch + 1, batch):
            started = time.perf_counter()
            searcher.search(queries[start : start + batch], checkpoints, k)
            times.append(1e3 * (time.perf_counter() - started))
        rate = 1e3 * batch / np.mean(times)
        latency = f"{np.median(times):.1f} / {np.quantile(times, 0.95):.1f}"
        print(f"| batch {batch}: median / 95 %, ms; queries a second | {latency}; {rate:.0f} |")
    touched = np.mean([result.rows_touched / result.rows_searched for result in results])
    print(f"| rows read beyond the first level | {100 * touched:.2f} % |")
    print(f"| peak resident memory, MB (mapped files count) | {peak():,.0f} |")
    started = time.perf_counter()
    recall = np.mean([found(*pair) for pair in zip(results, scan(store, queries[:_CHECKED]), strict=False)])
    print(f"| recall at both ends, beside a scan | {recall:.4f} |")
    print(f"| scan of the index for {_CHECKED} queries, s | {time.perf_counter() - started:.1f} |")


def scan(store: RowStore, queries: Tensor) -> Iterable[NDArray[np.float32]]:
    return exhaustive_scores(store, queries, range(store.checkpoints))


def found(result: SearchResult, scores: NDArray[np.float32]) -> float:
    """Share of both ends of these scores that the search found. Scores that differ by rounding alone count as equal."""
    k, order = len(result.top.rows), np.sort(scores)
    slack = 1e-5 * float(np.abs(scores).max())
    top = scores[result.top.rows] >= order[-k] - slack
    bottom = scores[result.bottom.rows] <= order[k - 1] + slack
    return float(np.concatenate([top, bottom]).mean())


if __name__ == "__main__":
    main()
