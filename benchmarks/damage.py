"""What callers hear while the files of an index are damaged in place: `python -m benchmarks.damage digits --flips 300`.

A service answers eight clients from a copy of the index. Again and again one file of the copy, drawn by chance, gets
one bit flipped, or is truncated, and a moment later it is restored. Every answer is compared with that of the undamaged
index: one that differs is wrong, and none may be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.serving import served
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace.store.manifest_file import read_manifest

_CLIENTS = 8
_QUESTIONS = 24
_METHODS = ("tracin", "influence", "cosine")
_READY_SECONDS = 120.0

Answer = list[tuple[int, float]]  # row and score of each hit, those of both ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, help="default: RUNS/DATASET/index")
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--truncations", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long a file stays damaged")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    index = arguments.index or arguments.runs / arguments.dataset / "index"
    with tempfile.TemporaryDirectory(dir=index.parent) as folder:
        copy = Path(folder) / "index"
        shutil.copytree(index, copy)
        (copy.parent / "checkpoints").symlink_to((index.parent / "checkpoints").resolve())
        singly = ("--batch-size", "1")  # several queries in one pass are rounded otherwise than one
        with served(copy, task_spec(arguments.dataset), *singly) as service:
            right = asyncio.run(right_answers(service.url))
            print("| damage | times | 200, right | 200, wrong | other answers | service |\n|---|--:|--:|--:|---|---|")
            for name, times in (("a bit flipped", arguments.flips), ("truncated", arguments.truncations)):
                heard = asyncio.run(damaged(service.url, right, copy, name, times, arguments.seconds))
                state = "alive" if psutil.pid_exists(service.process) else "ended"
                others = ", ".join(f"{count:,} x {kind}" for kind, count in heard.items() if kind not in _COLUMNS)
                print(
                    f"| {name} | {times} | {heard['right']:,} | {heard['wrong']:,} | {others} | {state} |", flush=True
                )


_COLUMNS = ("right", "wrong")


def question(number: int) -> dict[str, Any]:
    return {"query_rows": [number], "k": 20, "method": _METHODS[number % len(_METHODS)]}


def answer_in(response: httpx.Response) -> Answer:
    result = response.json()["results"][0]
    return [(hit["row"], hit["score"]) for hit in (*result["proponents"], *result["opponents"])]


async def right_answers(url: str) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=_READY_SECONDS) as http:
        await ready(http)
        responses = [await http.post("/influence", json=question(number)) for number in range(_QUESTIONS)]
    return [answer_in(response.raise_for_status()) for response in responses]


async def ready(http: httpx.AsyncClient) -> None:
    ends = time.monotonic() + _READY_SECONDS
    while (await http.post("/influence", json=question(0))).status_code != 200:
        if time.monotonic() > ends:
            raise SystemExit("the service does not answer from the restored index")
        await asyncio.sleep(0.05)


async def damaged(url: str, right: list[Answer], index: Path, name: str, times: int, seconds: float) -> Counter[str]:
    """What the clients heard while files were damaged so many times."""
    heard: Counter[str] = Counter()
    ended = asyncio.Event()
    random = np.random.default_rng(0)
    files = [MANIFEST_NAME, *(entry.path for entry in read_manifest(index).files())]
    async with httpx.AsyncClient(base_url=url, timeout=_READY_SECONDS) as http:
        asking = [asyncio.ensure_future(ask(http, right, first, ended, heard)) for first in range(_CLIENTS)]
        for _ in range(times):
            path = index / files[random.integers(len(files))]
            position = int(random.integers(path.stat().st_size))
            content = path.read_bytes()
            if name == "truncated":
                os.truncate(path, position)
            else:
                overwrite(path, position, bytes([content[position] ^ 1 << int(random.integers(8))]))
            await asyncio.sleep(seconds)
            overwrite(path, 0, content)
            await ready(http)
        ended.set()
        await asyncio.gather(*asking)
    return heard


def overwrite(path: Path, position: int, content: bytes) -> None:
    """In place: the file stays the same inode."""
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


async def ask(
    http: httpx.AsyncClient, right: list[Answer], first: int, ended: asyncio.Event, heard: Counter[str]
) -> None:
    """One client, until `ended`."""
    number = first
    while not ended.is_set():
        number = (number + 1) % len(right)
        try:
            response = await http.post("/influence", json=question(number))
        except httpx.HTTPError as error:
            heard[type(error).__name__] += 1
            continue
        if response.status_code == 200:
            heard["right" if answer_in(response) == right[number] else "wrong"] += 1
        else:
            heard[f"{response.status_code} {response.json()['type'].rpartition(':')[2]}"] += 1
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
