"""A small real task for end-to-end tests: 400 handwritten digits, a network of 2,410 weights, three checkpoints.

The digits are the first of scikit-learn's `load_digits`, whose import would take each process that loads the task, and
each worker of a service, longer than all else that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from gradtrace import CheckpointRecorder
from gradtrace.tasks import ImageClassification

TRAIN_ROWS, QUERY_ROWS = 400, 60
DIGITS = Path(__file__).parent / "data" / "digits.npz"  # images: uint8 [460, 8, 8], labels: uint8 [460]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load(rows: slice) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with np.load(DIGITS) as digits:
        return digits["images"][rows], digits["labels"][rows].astype(np.int64)


TASK = ImageClassification(
    model,
    train=lambda: load(slice(TRAIN_ROWS)),
    query=lambda: load(slice(TRAIN_ROWS, TRAIN_ROWS + QUERY_ROWS)),
    class_names=NAMES,
)


class Retrained(ImageClassification):
    """The same, for commands and jobs that train anew: 30 steps on all rows that they are given."""

    def fit(self, rows: Sequence[int], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = self.model()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
        images, labels = self.collate([self.train[row] for row in rows])
        for _ in range(30):
            optimizer.zero_grad()
            self.loss(network, (images, labels)).mean().backward()
            optimizer.step()
        return network


RETRAINED = Retrained(model, TASK.train, TASK.query, class_names=NAMES)


def train(directory: Path, steps: int = 60) -> None:
    """Leave three checkpoints of a short training run in `directory`."""
    torch.manual_seed(0)
    network = TASK.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    recorder = CheckpointRecorder(directory, every=steps // 3)
    images, labels = TASK.collate([TASK.train[row] for row in range(TRAIN_ROWS)])
    for _ in range(steps):
        rows = torch.randint(TRAIN_ROWS, (64,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
        recorder.step(network, optimizer)
