"""MNIST and the fully connected network of the TracIn paper: three hidden layers, 243,000 weights."""

import numpy as np
from torch import nn

from gradtrace.tasks import ImageClassification, data_file


def model() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256), nn.ReLU(),
        nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(data_file(f"mnist-{split}.npz")) as arrays:
        return arrays["images"], arrays["labels"]


TASK = ImageClassification(
    model,
    train=lambda: load("train"),
    query=lambda: load("test"),
    class_names=[str(digit) for digit in range(10)],
    mean=0.1307,
    std=0.3081,
)
