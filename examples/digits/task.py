"""Handwritten digits of 8 x 8 pixels (bundled with scikit-learn) and a small convolutional network."""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from gradtrace.tasks import ImageClassification

TRAIN_ROWS = 1_500  # of 1,797; the others are the queries


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def load(rows: slice) -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images[rows] * 255 / 16).round().astype(np.uint8), digits.target[rows]


TASK = ImageClassification(
    model,
    train=lambda: load(slice(TRAIN_ROWS)),
    query=lambda: load(slice(TRAIN_ROWS, None)),
    class_names=[str(digit) for digit in range(10)],
)
