"""How long one query takes over HTTP, and where the time goes: `python -m benchmarks.latency cifar10 --index DIR`.

The service runs in a process of its own; the SDK asks one query at a time, an image without a label. Then the same
queries go to the index in this process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.serving import served
from gradtrace import Index, Task, open_index
from gradtrace.data.dataset import fetch
from gradtrace_client import Client
from gradtrace_client.schemas import Payload
from gradtrace_indexer.task_loading import load_task

_WARM_UP = 10

Times = dict[str, NDArray[np.float64]]  # milliseconds of each query, [queries], by what they were spent on
Found = list[list[int]]  # rows found for each query, those of both ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: the one that benchmarks.throughput built")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    path = arguments.index or arguments.runs / arguments.dataset / "index-gauss-newton-1024-float16"
    spec = task_spec(arguments.dataset)
    task = load_task(spec)
    payloads = requests(task, arguments.queries + _WARM_UP)
    with served(path, spec) as service, Client(service.url) as client:
        over_http, found = ask(client, payloads, arguments.k)
    index = open_index(path, task)
    in_process, expected = ask_in_process(index, payloads, arguments.k)
    if found != expected:
        sys.exit("the service found other rows than the index in this process")
    print(
        f"| {arguments.dataset}: {index.rows:,} rows x {len(index.manifest.checkpoints)} checkpoints x "
        f"{index.manifest.basis.dimensions:,} dimensions, {arguments.queries} queries, k = {arguments.k} "
        "| median, ms | 95 %, ms |\n|---|--:|--:|"
    )
    for where, times in (("HTTP", over_http), ("in process", in_process)):
        for name, values in times.items():
            print(f"| {where}: {name} | {np.median(values):.2f} | {np.quantile(values, 0.95):.2f} |")


def requests(task: Task, count: int) -> list[Payload]:
    """Requests for random test examples, as the task renders them."""
    rows = np.random.default_rng(0).choice(len(task.query), count, replace=False)
    return [task.render(example) for example in fetch(task.query, rows.tolist())]


def ask(client: Client, payloads: Sequence[Payload], k: int) -> tuple[Times, Found]:
    """Times and found rows of all but the first few queries, which warm up."""
    lines, found = [], []
    for payload in payloads:
        started = time.perf_counter()
        answer = client.influence(payload, k=k)
        whole, spent = 1e3 * (time.perf_counter() - started), answer.timing_ms
        rest = spent.total - spent.queue - spent.gradient - spent.search
        lines.append((whole, spent.gradient, spent.search, spent.queue, rest, whole - spent.total))
        result = answer.results[0]
        found.append([hit.row for hit in (*result.proponents, *result.opponents)])
    names = ("end to end", "gradient", "search", "queue", "parsing, rendering", "network, JSON")
    return _by_name(names, lines), found


def ask_in_process(index: Index, payloads: Sequence[Payload], k: int) -> tuple[Times, Found]:
    """As `ask`; examples are parsed before the clock starts."""
    lines, found = [], []
    for payload in payloads:
        example = index.task.parse(payload)
        started = time.perf_counter()
        results = index.influence([example], k=k)
        whole = 1e3 * (time.perf_counter() - started)
        lines.append((whole, *(results.timing[name] for name in ("gradient", "search", "rest"))))
        found.append([hit.row for hit in (*results[0].proponents, *results[0].opponents)])
    return _by_name(("end to end", "gradient", "search", "rest"), lines), found


def _by_name(names: Sequence[str], lines: Sequence[tuple[float, ...]]) -> Times:
    return dict(zip(names, np.array(lines[_WARM_UP:]).T, strict=True))


if __name__ == "__main__":
    main()
