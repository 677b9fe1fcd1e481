"""What many clients at once get from the service: `python -m benchmarks.load cifar10 --index DIR --seconds 120`.

Each client asks about one image after the other, random test examples without a label. The service runs in a process of
its own, with its micro-batches and then with batches of one query. With --swaps N, generations of the index are
exchanged N times meanwhile: the one as it is, and one without the rows that were found in it. An answer is mixed if it
is not what its generation answered to the same question before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.latency import requests
from benchmarks.serving import served
from gradtrace_client.schemas import Payload
from gradtrace_indexer import delete_rows
from gradtrace_indexer.generations import roll_back
from gradtrace_indexer.task_loading import load_task

_QUESTIONS = 200
_CLIENT_SECONDS = 120.0  # until a client gives up


@dataclass
class Heard:
    """What the clients were answered."""

    milliseconds: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # statuses other than 200, and failures, by kind
    rows: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # by contents of the index and question
    generations: set[int] = field(default_factory=set)
    mixed: int = 0

    def line(self, clients: int, batch_size: int, seconds: float) -> str:
        p50, p95, p99 = np.percentile(self.milliseconds or [np.nan], [50, 95, 99])
        others = ", ".join(f"{count} x {kind}" for kind, count in self.others.items()) or "none"
        return (
            f"| {clients} | {batch_size} | {len(self.milliseconds) / seconds:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f} "
            f"| {np.mean(self.batches or [0]):.1f} | {others} |"
        )

    def answered(self, question: int, answer: dict[str, Any]) -> None:
        result, generation = answer["results"][0], answer["index"]["generation"]
        found = [hit["row"] for hit in (*result["proponents"], *result["opponents"])]
        self.batches.append(answer["timing_ms"]["batch"])
        self.generations.add(generation)
        self.mixed += self.rows.setdefault((generation % 2, question), found) != found


async def ask(
    http: httpx.AsyncClient, payloads: Sequence[Payload], first: int, ended: asyncio.Event, heard: Heard
) -> None:
    """One client, until `ended`."""
    for question in itertools.cycle([*range(first, len(payloads)), *range(first)]):
        if ended.is_set():
            return
        started = time.perf_counter()
        try:
            response = await http.post("/influence", json={"example": payloads[question]})
        except httpx.HTTPError as error:
            heard.others[type(error).__name__] += 1
            continue
        if response.status_code == 200:
            heard.milliseconds.append(1e3 * (time.perf_counter() - started))
            heard.answered(question, response.json())
        else:
            heard.others[str(response.status_code)] += 1
            await asyncio.sleep(float(response.headers.get("retry-after", 0)))


async def load(
    url: str, payloads: Sequence[Payload], clients: int, meanwhile: Callable[[], None]
) -> tuple[Heard, float]:
    """What so many clients hear while `meanwhile` runs on another thread, and the seconds that it took."""
    heard, ended = Heard(), asyncio.Event()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_CLIENT_SECONDS) as http:
        await http.post("/influence", json={"example": payloads[0]})  # warm
        started = time.perf_counter()
        firsts = [number * len(payloads) // clients for number in range(clients)]
        asking = [asyncio.ensure_future(ask(http, payloads, first, ended, heard)) for first in firsts]
        await asyncio.to_thread(meanwhile)
        seconds = time.perf_counter() - started
        ended.set()
        await asyncio.gather(*asking)
    return heard, seconds


def swap(index: Path, url: str, swaps: int) -> None:
    """Publish the first two generations in turn, each once the service has taken over the one before."""
    for number in range(swaps):
        published = roll_back(index, 1 + number % 2).generation
        while httpx.get(f"{url}/index", timeout=_CLIENT_SECONDS).json()["generation"] != published:
            time.sleep(0.2)


def two_generations(index: Path, folder: Path, found: Sequence[int]) -> Path:
    """A copy of the index whose second generation lacks some rows."""
    copy = folder / "index"
    shutil.copytree(index, copy, copy_function=os.link)  # files of an index never change
    (folder / "checkpoints").symlink_to((index.parent / "checkpoints").resolve())
    delete_rows(copy, found)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: RUNS/DATASET/index")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--swaps", type=int, default=0, help="exchange generations so often, under the most clients")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    index = arguments.index or arguments.runs / arguments.dataset / "index"
    spec = task_spec(arguments.dataset)
    payloads = requests(load_task(spec), _QUESTIONS)
    print("| clients | batch size | answers a second | p50, ms | p95, ms | p99, ms | mean batch | other than 200 |")
    print("|--:|--:|--:|--:|--:|--:|--:|---|")
    for batch_size in arguments.batch_sizes:
        with served(index, spec, "--batch-size", str(batch_size)) as service:
            for clients in arguments.clients:
                heard, seconds = asyncio.run(
                    load(service.url, payloads, clients, lambda: time.sleep(arguments.seconds))
                )
                print(heard.line(clients, batch_size, seconds), flush=True)
    if arguments.swaps:
        found = sorted({row for rows in heard.rows.values() for row in rows})
        with tempfile.TemporaryDirectory(dir=index.parent) as folder:
            print(swapped(two_generations(index, Path(folder), found), spec, payloads, clients, arguments.swaps))


def swapped(index: Path, spec: str, payloads: Sequence[Payload], clients: int, swaps: int) -> str:
    """What came of exchanging generations under load."""
    with served(index, spec) as service:
        heard, _ = asyncio.run(load(service.url, payloads, clients, lambda: swap(index, service.url, swaps)))
    both = [question for question in range(len(payloads)) if {(0, question), (1, question)} <= heard.rows.keys()]
    differ = sum(heard.rows[0, question] != heard.rows[1, question] for question in both)
    return (
        f"\n{swaps} swaps under {clients} clients: {len(heard.milliseconds):,} answers of {len(heard.generations)} "
        f"generations, {heard.mixed} mixed, other than 200: {dict(heard.others) or 'none'}; the generations differ in "
        f"{differ} of {len(both)} answers"
    )


if __name__ == "__main__":
    main()
