"""Labels, predictions and losses of the digits by PyTorch alone, in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import digits_task
import gradtrace
from conftest import DigitsRun
from gradtrace import Checkpoint

TASK = digits_task.TASK


@dataclass(frozen=True)
class Expected:
    """Of every row of a data set, each [rows]."""

    labels: NDArray[Any]
    predictions: NDArray[Any]
    losses: NDArray[Any]


def of_digits(checkpoint: Checkpoint, split: str) -> Expected:
    model, dataset = TASK.model(), getattr(TASK, split)
    model.load_state_dict(checkpoint.load())
    images, labels = TASK.collate([dataset[row] for row in range(len(dataset))])
    with torch.no_grad():
        logits = model.double()(images.double())
    losses = F.cross_entropy(logits, labels, reduction="none")
    return Expected(labels.numpy(), logits.argmax(1).numpy(), losses.numpy())


def of_last_digits(run: DigitsRun) -> dict[str, Expected]:
    """At the last checkpoint, by data set."""
    last = gradtrace.load_checkpoints(run.checkpoints)[-1]
    return {split: of_digits(last, split) for split in ("train", "query")}
