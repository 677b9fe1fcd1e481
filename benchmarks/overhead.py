"""What HTTP, the queue and rendering add to a query: `python -m benchmarks.overhead cifar10 --index DIR`.

One client asks the service, in a process of its own, by the SDK; after each answer the same question goes to
`index.influence` in this process. Then the same questions again: their hits have been rendered before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.latency import requests
from benchmarks.serving import served
from gradtrace import Index, open_index
from gradtrace_client import Client
from gradtrace_client.schemas import Payload
from gradtrace_indexer.task_loading import load_task

_WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: RUNS/DATASET/index")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    path = arguments.index or arguments.runs / arguments.dataset / "index"
    spec = task_spec(arguments.dataset)
    task = load_task(spec)
    payloads, index = requests(task, arguments.queries + _WARM_UP), open_index(path, task)
    print(
        "| median, ms | over HTTP | `index.influence` | difference | of HTTP, beside gradient and search | rendering |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    with served(path, spec) as service, Client(service.url) as client:
        compare(client, index, payloads[:_WARM_UP])
        for name in ("asked for the first time", "asked again"):
            medians = compare(client, index, payloads[_WARM_UP:])
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |", flush=True)


def compare(client: Client, index: Index, payloads: Sequence[Payload]) -> list[float]:
    """Median milliseconds: over HTTP; in this process; their difference; what HTTP took beside the gradient and the
    search that the service itself measured; rendering."""
    lines = []
    for payload in payloads:
        example = index.task.parse(payload)
        started = time.perf_counter()
        spent = client.influence(payload).timing_ms
        answered = time.perf_counter()
        index.influence([example])
        over_http, bare = 1e3 * (answered - started), 1e3 * (time.perf_counter() - answered)
        lines.append((over_http, bare, over_http - bare, over_http - spent.gradient - spent.search, spent.render))
    medians: list[float] = np.median(lines, axis=0).tolist()
    return medians


if __name__ == "__main__":
    main()
