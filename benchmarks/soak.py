"""Whether the service's memory stays what it is: `python -m benchmarks.soak digits --requests 50000`.

Some clients ask about random test and training rows, with and without rendered examples, and for pages of
self-influence, and some requests are wrong. Every tenth of the requests the memory of the service is told.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.serving import served
from gradtrace_indexer.task_loading import load_task

_CLIENTS = 16

Question = tuple[str, str, dict[str, object] | None]  # method, path and body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: RUNS/DATASET/index")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    index = arguments.index or arguments.runs / arguments.dataset / "index"
    spec = task_spec(arguments.dataset)
    task = load_task(spec)
    questions = requests(len(task.train), len(task.query))
    statuses: Counter[int] = Counter()
    print("| requests | memory, MB | answers by status |\n|--:|--:|---|")
    with served(index, spec) as service:
        process = psutil.Process(service.process)
        for _ in range(10):
            asyncio.run(ask(service.url, itertools.islice(questions, arguments.requests // 10), statuses))
            memory = process.memory_info().rss / 2**20
            print(f"| {statuses.total():,} | {memory:.1f} | {dict(sorted(statuses.items()))} |", flush=True)


def requests(train: int, query: int) -> Iterator[Question]:
    """(method, path, body) without end."""
    random = np.random.default_rng(0)
    for number in itertools.count():
        row = int(random.integers(query))
        if number % 10 == 7:
            yield "GET", f"/self-influence?k=20&offset={int(random.integers(train - 20))}", None
        elif number % 10 == 8:
            yield "POST", "/influence", {"train_rows": [int(random.integers(train))], "include": ["parts"]}
        elif number % 100 == 9:
            yield "POST", "/influence", {"example": {"image": "@@@"}}
        else:
            yield "POST", "/influence", {"query_rows": [row]}


async def ask(url: str, questions: Iterator[Question], statuses: Counter[int]) -> None:
    """Send them all, a few at a time."""

    async def client(http: httpx.AsyncClient) -> None:
        for method, path, body in questions:
            response = await http.request(method, path, json=body)
            statuses[response.status_code] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await asyncio.gather(*(client(http) for _ in range(_CLIENTS)))


if __name__ == "__main__":
    main()
