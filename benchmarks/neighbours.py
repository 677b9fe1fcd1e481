"""What the clients of a small index get beside those of a large one, from one service.

    python -m benchmarks.neighbours cifar10 digits --clients 32 2

First the clients of either index are alone, then both are there, and the large index is opened meanwhile: the service
starts with the small one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.latency import requests
from benchmarks.serving import served
from gradtrace_client.schemas import Payload
from gradtrace_indexer.task_loading import load_task

_QUESTIONS = 100
_CLIENT_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("large", choices=DATASETS)
    parser.add_argument("small", choices=DATASETS)
    parser.add_argument("--indexes", type=Path, nargs=2, help="default: RUNS/DATASET/index of either")
    parser.add_argument("--clients", type=int, nargs=2, default=[32, 2])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("flags", nargs="*", help="of `gradtrace serve`, after --")
    arguments = parser.parse_args()
    names = [arguments.large, arguments.small]
    large, small = arguments.indexes or [arguments.runs / name / "index" for name in names]
    payloads = [requests(load_task(task_spec(name)), _QUESTIONS) for name in names]
    both = (f"small={small}", task_spec(names[1]), f"large={large}", "--task", task_spec(names[0]), *arguments.flags)
    print(
        "| clients | answers a second | p50, ms | p99, ms | longest, ms | other than 200 |\n|---|--:|--:|--:|--:|--:|"
    )
    with served(*both) as service:
        small_alone = asyncio.run(
            loaded(service.url, [("small", arguments.clients[1], payloads[1])], arguments.seconds)
        )
        together = [("large", arguments.clients[0], payloads[0]), ("small", arguments.clients[1], payloads[1])]
        opening = asyncio.run(loaded(service.url, together, arguments.seconds))
        warm = asyncio.run(loaded(service.url, together, arguments.seconds))
        large_alone = asyncio.run(loaded(service.url, together[:1], arguments.seconds))
    stages = (("alone", [*small_alone, *large_alone]), ("as the large one opens", opening), ("together", warm))
    for stage, lines in stages:
        print("\n".join(f"| {stage}: {line}" for line in lines))


async def loaded(url: str, groups: Sequence[tuple[str, int, Sequence[Payload]]], seconds: float) -> list[str]:
    """A line of the table for each (index, clients, questions) that ask at the same time."""
    ended = asyncio.Event()
    async with httpx.AsyncClient(
        base_url=url, timeout=_CLIENT_SECONDS, limits=httpx.Limits(max_connections=256)
    ) as http:
        await http.post("/influence", json={"example": groups[-1][2][0], "index": groups[-1][0]})
        asking = [
            asyncio.gather(*(ask(http, index, payloads, first, ended) for first in range(clients)))
            for index, clients, payloads in groups
        ]
        await asyncio.sleep(seconds)
        ended.set()
        heard = [await group for group in asking]
    return [
        line(
            f"{clients} of {index}",
            [time for times, _ in group for time in times],
            sum(bad for _, bad in group),
            seconds,
        )
        for (index, clients, _), group in zip(groups, heard, strict=True)
    ]


async def ask(
    http: httpx.AsyncClient, index: str, payloads: Sequence[Payload], first: int, ended: asyncio.Event
) -> tuple[list[float], int]:
    """One client, until `ended`: milliseconds of each answer, and the number of refusals."""
    times, refused = [], 0
    for question in itertools.count(first * 7):
        if ended.is_set():
            break
        started = time.perf_counter()
        response = await http.post("/influence", json={"example": payloads[question % len(payloads)], "index": index})
        times.append(1e3 * (time.perf_counter() - started))
        refused += response.status_code != 200
    return times, refused


def line(who: str, times: Sequence[float], refused: int, seconds: float) -> str:
    p50, p99 = np.percentile(times, [50, 99])
    return f"{who} | {len(times) / seconds:.1f} | {p50:.0f} | {p99:.0f} | {max(times):.0f} | {refused} |"


if __name__ == "__main__":
    main()
