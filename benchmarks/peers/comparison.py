"""What every comparison shares: the trained examples, cut to a few rows, and the table."""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from benchmarks.datasets import task_spec
from benchmarks.exact import agreement
from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace.task import Example, Task
from gradtrace_indexer.task_loading import load_task

HEADER = (
    "| peer | method | data | rows | Pearson r, mean | lowest | top 10 | bottom 10 | peer, CPU s | Gradtrace, CPU s |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
)
Scores = NDArray[np.float32]  # [queries, rows]


@dataclass(frozen=True)
class Case:
    """One trained example: `task.train` holds the first `rows` training rows only."""

    dataset: str
    task: Task
    checkpoints: Sequence[Checkpoint]
    queries: Sequence[Example]

    @property
    def rows(self) -> int:
        return len(self.task.train)


def load_case(dataset: str, runs: Path, rows: int, queries: int) -> Case:
    task = copy.copy(load_task(task_spec(dataset)))
    task.train = Subset(task.train, range(rows))
    return Case(dataset, task, load_checkpoints(runs / dataset / "checkpoints"), fetch(task.query, range(queries)))


def timed(scores: Callable[[], Scores]) -> tuple[Scores, float]:
    """And the seconds of processor time that they took."""
    started = time.process_time()
    return scores(), time.process_time() - started


def compared(case: Case, peer: str, method: str, theirs: tuple[Scores, float], ours: tuple[Scores, float]) -> str:
    """A row of the table."""
    (expected, their_seconds), (scores, our_seconds) = theirs, ours
    r, top = agreement(scores, expected)
    _, bottom = agreement(-scores, -expected)
    lowest = min(np.corrcoef(a, b)[0, 1] for a, b in zip(scores, expected, strict=True))
    return (
        f"| {peer} | {method} | {case.dataset} | {case.rows:,} | {r:.5f} | {lowest:.5f} | {top:.2f} | {bottom:.2f} | "
        f"{their_seconds:.0f} | {our_seconds:.0f} |"
    )


def parse(description: str | None, rows: int, queries: int) -> argparse.Namespace:
    """The command line of every comparison, and quiet peers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("datasets", nargs="*", default=["mnist", "cifar10"])
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--queries", type=int, default=queries)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    warnings.filterwarnings("ignore", module="captum")
    logging.disable(logging.WARNING)
    return parser.parse_args()
