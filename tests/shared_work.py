"""A build whose work is shared: many small steps, in this process and in each worker that imports this module."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint
from gradtrace_indexer.build import begin, fit, moments
from tiny import ClassTask

begin._SHARD_ROWS = 30
moments._FEWEST_ROWS = 70
fit._SAMPLE_ROWS = 60


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
