"""A build whose work is shared: many small steps, in tests that ask for it and in the workers that they start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint
from gradtrace_indexer import build_index
from gradtrace_indexer.build import begin, fit, moments
from tiny import ClassTask

_SMALL = {(begin, "_SHARD_ROWS"): 30, (moments, "_FEWEST_ROWS"): 70, (fit, "_SAMPLE_ROWS"): 60}
_FLAG = "GRADTRACE_TEST_SMALL_STEPS"


@pytest.fixture(scope="module")
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_FLAG, "1")
        for (module, name), value in _SMALL.items():
            patch.setattr(module, name, value)
        yield


if _FLAG in os.environ:  # this is a worker of such a test
    for (module, name), value in _SMALL.items():
        setattr(module, name, value)


class SharedTask(ClassTask):
    """SLEEP in the environment: seconds that a loss takes."""

    def __init__(self, rows: int = 200) -> None:
        super().__init__(tiny.mlp, [(x, label, row) for row, (x, label) in enumerate(tiny.classes(200)[:rows])])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(float(os.environ.get("SLEEP", "0")))
        return super().loss(model, batch)


class BadRowsTask(SharedTask):
    """Rows without a finite loss, some of them only where the model's first weight is negative."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        is_negative = next(model.parameters())[0, 0] < 0
        bad = (batch[2] % 41 == 7) | ((batch[2] % 37 == 5) & is_negative)
        return torch.where(bad, torch.nan, super().loss(model, batch))


class FailingTask(SharedTask):
    """Its rows cannot be differentiated in a worker process."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        losses = super().loss(model, batch)
        return torch.where(batch[2] == 150, torch.inf, losses)


def checkpoints(folder: Path) -> list[Checkpoint]:
    return tiny.checkpoints(SharedTask(), folder, 3)


def built(task: SharedTask, path: Path, **options: Any) -> dict[str, bytes]:
    """The files of an index, whose checkpoints lie beside it."""
    build_index(task, checkpoints(path.parent / "checkpoints"), path, progress=False, **{"batch_size": 16, **options})
    return tiny.files(path)


@pytest.fixture(scope="module")
def alone(small_steps: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return built(SharedTask(), tmp_path_factory.mktemp("alone") / "index")
