from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import digits_task
import gradtrace
from gradtrace import Index
from gradtrace_indexer import build_index

# The tests' tensors are small: a second thread gains nothing, and on a busy machine the threads wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

# Machines differ in speed: a property that is slow to check is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@dataclass(frozen=True)
class DigitsRun:
    """What a user has after training and building: folders, and the task as the command line names it."""

    checkpoints: Path
    index: Path
    task: str

    def open(self) -> Index:
        """A new Index, as each thread needs its own."""
        return gradtrace.open_index(self.index, digits_task.TASK)


@pytest.fixture(scope="session")
def digits_index(tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """A trained model of 400 digits with three checkpoints, and its index."""
    out = tmp_path_factory.mktemp("digits")
    digits_task.train(out / "checkpoints")
    checkpoints = gradtrace.load_checkpoints(out / "checkpoints")
    build_index(digits_task.TASK, checkpoints, out / "index", dimensions=256, progress=False)
    return DigitsRun(out / "checkpoints", out / "index", f"{digits_task.__file__}:TASK")


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Writing past so many bytes of a file fails from now on, as on a full disk; in processes that are started, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
