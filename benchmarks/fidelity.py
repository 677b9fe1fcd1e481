"""How close an index's scores are to exact TracInCP: `python -m benchmarks.fidelity mnist --dimensions 1024`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.exact import agreement, exact_tracin
from gradtrace.checkpoints import load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--basis", nargs="+", default=["gauss-newton", "spectral", "two-sided"])
    parser.add_argument("--precision", nargs="+", default=["float16"])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run: Path = arguments.runs / arguments.dataset
    task = load_task(task_spec(arguments.dataset))
    checkpoints = load_checkpoints(run / "checkpoints")
    rows = np.sort(np.random.default_rng(0).choice(len(task.query), arguments.queries, replace=False))
    queries = fetch(task.query, rows.tolist())
    exact = exact_tracin(task, checkpoints, queries, run / f"exact-{arguments.queries}.npy")
    print(
        "| basis | dimensions | precision | Pearson r | top-10 overlap | bottom-10 overlap |\n|---|--:|---|--:|--:|--:|"
    )
    for basis in arguments.basis:
        for precision in arguments.precision:
            path = run / f"index-{basis}-{arguments.dimensions}-{precision}"
            index = build_index(
                task, checkpoints, path, dimensions=arguments.dimensions, basis=basis, precision=precision
            )
            scores = index.scores(queries)
            r, top = agreement(scores, exact)
            _, bottom = agreement(-scores, -exact)
            dimensions = index.manifest.basis.dimensions
            print(f"| {basis} | {dimensions} | {precision} | {r:.4f} | {top:.3f} | {bottom:.3f} |", flush=True)


if __name__ == "__main__":
    main()
