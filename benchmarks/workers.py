"""Rows a second of whole builds by several workers against a plain training step: `python -m benchmarks.workers mnist`.

Rows a second are those of the time that workers spend on rows, times the number of workers; fit, curvature and the
start of workers are in the figures of the whole build alone. Training steps are timed before, between and after builds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.throughput import training_step
from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.data.batches import collate
from gradtrace.data.dataset import fetch
from gradtrace.models.task_model import fresh_model
from gradtrace.task import Task
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task
from gradtrace_indexer.work.sharing import Rank
from gradtrace_indexer.work.watching import unfinished_steps

_BATCHES, _ROUNDS = 4, 6
_POLL_SECONDS = 0.05

WAYS: dict[str, dict[str, Any]] = {
    "this process": {"rank": Rank(0, 1)},
    "2 processes": {"workers": 2},
    "4 processes": {"workers": 4},
    "2 actors of Ray": {"workers": 2, "ray": "local"},
}


@dataclass
class Timed:
    """Of a build: seconds from its beginning to its end, and the sum of what its workers spent on rows."""

    seconds: float = 0.0
    worker_seconds: float = 0.0


def first_rows(dataset: str, rows: int | None) -> Task:
    """The task with so many of its training rows."""
    task = load_task(task_spec(dataset))
    if rows is not None:
        task.train = torch.utils.data.Subset(task.train, range(rows))  # type: ignore[arg-type]
    return task


class Bench:
    def __init__(self, dataset: str, runs: Path, rows: int | None, batch_size: int, last: int) -> None:
        self._load = partial(first_rows, dataset, rows)
        self.task, self._batch_size = self._load(), batch_size
        self.checkpoints: list[Checkpoint] = load_checkpoints(runs / dataset / "checkpoints")[-last:]

    def training_rows_per_second(self) -> float:
        """Of plain steps of stochastic gradient descent, on all threads."""
        size = self._batch_size
        rows = [row % len(self.task.train) for row in range(size * _BATCHES)]
        batches = [fetch(self.task.train, rows[start : start + size]) for start in range(0, len(rows), size)]
        model = fresh_model(self.task, batches[0])
        step = training_step(self.task, model.requires_grad_(True))
        collated = [collate(self.task, batch, torch.device("cpu")).collated for batch in batches]
        times = []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            for batch in collated:
                step(batch)
            times.append(time.perf_counter() - started)
        return size * _BATCHES / median(times)

    def build(self, options: dict[str, Any]) -> Timed:
        timed, done = Timed(), threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            watching = threading.Thread(target=_watch, args=(path, timed, done))
            watching.start()
            started = time.perf_counter()
            build_index(
                self.task, self.checkpoints, path, batch_size=self._batch_size, progress=False,
                load=self._load, **options,
            )  # fmt: skip
            timed.seconds = time.perf_counter() - started
            done.set()
            watching.join()
            shutil.rmtree(path)
        return timed


def _watch(path: Path, timed: Timed, done: threading.Event) -> None:
    before = time.perf_counter()
    while not done.wait(_POLL_SECONDS):
        states = [state for state in unfinished_steps(path) if state.step.name.startswith("rows-")]
        now = time.perf_counter()
        timed.worker_seconds += sum(state.holder is not None and not state.is_done for state in states) * (now - before)
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["this process", "2 processes"])
    parser.add_argument("--rows", type=int, help="Index only the first ones.")
    parser.add_argument("--last", type=int, default=5, help="So many of the training's last checkpoints.")
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--basis", default="gauss-newton")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    bench = Bench(arguments.dataset, arguments.runs, arguments.rows, arguments.batch_size, arguments.last)
    steps, found = [bench.training_rows_per_second()], dict[str, Timed]()
    for way in arguments.ways:
        found[way] = bench.build({"dimensions": arguments.dimensions, "basis": arguments.basis, **WAYS[way]})
        steps.append(bench.training_rows_per_second())
    plain, rows = median(steps), len(bench.task.train) * len(bench.checkpoints)
    print(
        f"{arguments.dataset}, {rows:,} rows; training {plain:,.0f} rows/s ({min(steps):,.0f} to {max(steps):,.0f})\n"
    )
    print("| workers | rows/s | against a training step | whole build, s | its rows/s |\n|---|--:|--:|--:|--:|")
    for way, timed in found.items():
        rate, whole = WAYS[way].get("workers", 1) * rows / timed.worker_seconds, rows / timed.seconds
        print(f"| {way} | {rate:,.0f} | {rate / plain:.2f} x | {timed.seconds:.1f} | {whole:,.0f} |")


if __name__ == "__main__":
    main()
