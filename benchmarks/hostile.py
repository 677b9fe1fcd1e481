"""What hostile requests cost honest clients: `python -m benchmarks.hostile digits --requests 1000`.

Eight honest clients ask about one row after the other, alone and then beside the hostile requests that
`benchmarks/hostile_requests.py` draws. Marks: the honest 99th percentile stays below twice what it is alone, the memory
of all the service's processes below 1.5 times its usual, and nothing is answered with a 5xx but 503 with Retry-After.

All is done twice: with all clients at one address, as behind a proxy that does not say who asks, where the service
cannot tell honest ones from others; and with an address for each, of which each has a share of the workers' time. On
Linux, all addresses 127.x.y.z are this machine's.

Senders draw, pack and send on the processors that the service computes on, which real ones would not: they have the
lowest priority.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.hostile_requests import drawn, statuses
from benchmarks.serving import Served, served

_HONEST_CLIENTS = 8
_THINKING_SECONDS = 0.1  # of an honest client, between an answer and its next question
_SENDERS = 4
_NICE = 19  # of the senders
_ADDRESSES = {  # of the hostile senders, and of the honest clients
    "one address": ("127.0.0.1", ["127.0.0.1"] * _HONEST_CLIENTS),
    "an address for each": ("127.0.0.2", [f"127.0.1.{client + 1}" for client in range(_HONEST_CLIENTS)]),
}


@dataclass
class Watched:
    """What honest clients and the machine saw: seconds of each answer, their statuses, and the most memory in MB."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int | str] = field(default_factory=Counter)
    memory: float = 0.0

    def line(self, name: str) -> str:
        p50, p99 = np.percentile(self.seconds, (50, 99)) * 1000
        return f"| {name} | {len(self.seconds):,} | {p50:.1f} | {p99:.1f} | {self.memory:.0f} | {dict(self.statuses)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: RUNS/DATASET/index")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the honest clients alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--flags", default="", help="of gradtrace serve")
    arguments = parser.parse_args()
    gc.freeze()  # PyTorch's modules: a full collection would hold up the honest clients for 0.15 s
    index = arguments.index or arguments.runs / arguments.dataset / "index"
    with served(index, task_spec(arguments.dataset), *arguments.flags.split()) as service:
        while httpx.get(f"{service.url}/readyz").status_code != 200:
            time.sleep(0.1)
        with watched(service, _ADDRESSES["one address"][1]):  # until everything that is kept is in memory
            time.sleep(arguments.seconds / 3)
        print("| honest clients | answers | p50, ms | p99, ms | memory of the service, MB | statuses |")
        print("|---|--:|--:|--:|--:|---|")
        numbers = range(arguments.seed * 10**6, arguments.seed * 10**6 + arguments.requests)
        for name, (hostile, honest) in _ADDRESSES.items():
            with watched(service, honest) as alone:
                time.sleep(arguments.seconds)
            print(alone.line(f"alone, {name}"))
            with watched(service, honest) as beside:
                answered = attack(service.url, numbers, hostile)
            print(beside.line(f"beside {arguments.requests:,} hostile requests, {name}"))
    print("\n| hostile requests | answers by status (0: the connection was closed without one) |\n|---|---|")
    for kind, counts in sorted(answered.items()):
        print(f"| {kind} | {dict(sorted(counts.items()))} |")


def attack(url: str, numbers: range, address: str) -> dict[str, Counter[int]]:
    """Send the requests of these numbers, a few at a time. Returns the statuses by kind; 0: no answer."""
    answered: dict[str, Counter[int]] = {}
    send = partial(_sent, httpx.URL(url).host, httpx.URL(url).port or 0, address)
    with ProcessPoolExecutor(_SENDERS, initializer=os.nice, initargs=(_NICE,)) as senders:
        for kind, codes in senders.map(send, numbers):
            answered.setdefault(kind, Counter()).update(codes or [0])
    return answered


def _sent(host: str, port: int, address: str, number: int) -> tuple[str, list[int]]:
    hostile = drawn(number)
    with suppress(OSError):
        return hostile.kind, statuses(host, port, hostile, address=address)
    return hostile.kind, []


@contextmanager
def watched(service: Served, addresses: Sequence[str]) -> Iterator[Watched]:
    """Honest clients ask from these addresses, and memory is measured, until the block ends."""
    seen, stop = Watched(), threading.Event()
    threads = [
        threading.Thread(target=_ask, args=(service.url, client, address, seen, stop))
        for client, address in enumerate(addresses)
    ]
    threads.append(threading.Thread(target=_measure, args=(service.process, seen, stop)))
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _ask(url: str, client: int, address: str, seen: Watched, stop: threading.Event) -> None:
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=url, timeout=120, transport=transport) as http:
        row = client
        while not stop.wait(_THINKING_SECONDS):
            row, started = (row + _HONEST_CLIENTS) % 250, time.perf_counter()
            try:
                status: int | str = http.post("/influence", json={"query_rows": [row], "k": 5}).status_code
            except httpx.HTTPError as error:
                status = type(error).__name__
            seen.seconds.append(time.perf_counter() - started)
            seen.statuses[status] += 1


def _measure(process: int, seen: Watched, stop: threading.Event) -> None:
    root = psutil.Process(process)
    while not stop.wait(0.05):
        with suppress(psutil.NoSuchProcess):
            used = sum(one.memory_info().rss for one in (root, *root.children(recursive=True)))
            seen.memory = max(seen.memory, used / 2**20)


if __name__ == "__main__":
    main()
