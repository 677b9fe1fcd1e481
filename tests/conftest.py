from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import digits_task
import gradtrace
from gradtrace import Index
from gradtrace_indexer import build_index


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
