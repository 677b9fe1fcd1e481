"""What precision and dimensions cost and keep: `python -m benchmarks.precision mnist --dimensions 512 2048 8192`.

One index of the most dimensions is built in float16. Its columns are ordered by energy, so the others are its first
columns, rounded again (float16 keeps eleven bits, int8 eight at most). Compared with exact TracInCP.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.derived import rounded
from benchmarks.exact import agreement, exact_tracin
from benchmarks.search import query_vectors
from gradtrace.checkpoints import load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import exhaustive_scores
from gradtrace.store.manifest import Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.precision import encode, load_column_scales
from gradtrace.store.rows import RowStore
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task

_BATCH = 128
_TIMED = 50  # queries of which searches are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--precision", nargs="+", default=["float16", "int8", "int4"])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run, most = arguments.runs / arguments.dataset, max(arguments.dimensions)
    path = run / f"index-gauss-newton-{most}-float16"
    task = load_task(f"examples/{arguments.dataset}/task.py:TASK")
    checkpoints = load_checkpoints(run / "checkpoints")
    if not path.exists():
        build_index(task, checkpoints, path, dimensions=most, precision="float16")
    manifest = read_manifest(path)
    chosen = np.random.default_rng(0).choice(len(task.query), arguments.queries, replace=False).tolist()
    exact = exact_tracin(task, checkpoints, fetch(task.query, chosen), run / f"exact-queries-{arguments.queries}.npy")
    vectors = query_vectors(task, path, manifest, run / "checkpoints", arguments.queries)
    print(
        f"| {arguments.dataset}: {manifest.rows:,} rows, {len(checkpoints)} checkpoints | bytes a row and checkpoint "
        "| Pearson r | top-10 overlap | bottom-10 overlap | search, median ms | rows rounded a second |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )
    for precision in arguments.precision:
        for dimensions in arguments.dimensions:
            with tempfile.TemporaryDirectory(dir=run) as folder:
                index = rounded(RowStore(path, manifest), manifest, Path(folder), dimensions, precision)
                figures = compared(Path(folder), index, vectors[:, :, :dimensions].contiguous(), exact)
                print(f"| {precision}, {dimensions:,} dimensions | {figures} |", flush=True)


def compared(path: Path, manifest: Manifest, vectors: Tensor, exact: NDArray[np.float32]) -> str:
    store = RowStore(path, manifest)
    checkpoints = list(range(store.checkpoints))
    scores = exhaustive_scores(store, vectors, checkpoints)
    r, top = agreement(scores, exact)
    _, bottom = agreement(-scores, -exact)
    size = sum(shard.rows.bytes for shard in manifest.shards) / store.rows / store.checkpoints
    searched, rate = search_time(store, vectors), rounding_rate(path, manifest, store)
    return f"{size:,.0f} | {r:.4f} | {top:.3f} | {bottom:.3f} | {searched:.1f} | {rate:,.0f}"


def search_time(store: RowStore, vectors: Tensor) -> float:
    """Milliseconds of one query's search of both ends, k = 10."""
    searcher, times = ProgressiveSearcher(store), []
    for query in vectors[: _TIMED + 5]:
        started = time.perf_counter()
        searcher.search(query[None], range(store.checkpoints), 10)
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times[5:]))


def rounding_rate(path: Path, manifest: Manifest, store: RowStore) -> float:
    """Rows a second of the one step of a build that depends on the precision, on one core."""
    rows, scales = store.gather([0], range(_BATCH))[:, 0], load_column_scales(path, manifest)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        encode(rows, manifest.precision, *scales)
        times.append(time.perf_counter() - started)
    return _BATCH / float(np.median(times))


if __name__ == "__main__":
    main()
