"""As many rows as a benchmark asks for, of which each is made when it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradtrace import Task

_PIXELS = 64


class NoisyDigits:
    """Row i is digit i modulo 1,797, with noise of its own."""

    def __init__(self, rows: int, seed: int) -> None:
        digits = load_digits()
        self._images = torch.from_numpy(digits.data).float() / 16
        self._labels: list[int] = digits.target.tolist()
        self._rows, self._seed = rows, seed

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        digit = row % len(self._labels)
        # A counter gives each row its numbers: of every four there is one step.
        draw = np.random.Generator(np.random.Philox(key=self._seed).advance(int(row) * _PIXELS // 4))
        noise = torch.from_numpy(draw.random(_PIXELS)).float() - 0.5
        return self._images[digit] + noise, self._labels[digit]


class NoisyDigitsTask(Task):
    """A small network on them. rows: of the training data"""

    def __init__(self, rows: int) -> None:
        self.train, self.query = NoisyDigits(rows, 0), NoisyDigits(1000, 1)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(_PIXELS, 48), nn.Tanh(), nn.Linear(48, 10))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits
