"""Choosing among the checkpoints of a training by their losses on training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gradtrace.checkpoints import Checkpoint
from gradtrace.dataset import fetch
from gradtrace.devices import pick_device
from gradtrace.encoder import GradientModel
from gradtrace.guards import check_dataset
from gradtrace.task import Task


def mean_losses(
    task: Task,
    checkpoints: Sequence[Checkpoint],
    rows: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
) -> list[float]:
    """The mean loss at each checkpoint, in eval mode, on the same random training rows (all, where there are fewer).

    Raises:
        CheckpointError: weights are missing or do not fit the model.
        TaskError: the data set or the loss is not as `Task` asks.
    """
    total = check_dataset(task)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False)).tolist()
    parts = [fetch(task.train, chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    where = torch.device(pick_device(device))
    found = []
    for checkpoint in checkpoints:
        model = GradientModel(task, checkpoint, where, parts[0][:2])
        found.append(sum(float(model.losses(model.batch(part)).sum()) for part in parts) / len(chosen))
    return found
