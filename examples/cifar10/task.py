"""CIFAR-10 and a narrow ResNet-9 of 140,000 weights."""

import io
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gradtrace.tasks import ImageClassification, data_file

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.branch(features)


def model() -> nn.Module:
    layers = nn.Sequential(
        convolution(3, 16),
        convolution(16, 16), nn.MaxPool2d(2), Residual(16),
        convolution(16, 48), nn.MaxPool2d(2),
        convolution(48, 72), nn.MaxPool2d(2), Residual(72),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip
    return layers.to(memory_format=torch.channels_last)  # twice as fast on CPUs; outputs follow the weights' format


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [rows, 32, 32, 3] and labels, from WebP blocks of 100 images on top of each other."""
    with np.load(data_file(f"cifar10-{split}.npz")) as arrays:
        webp, offsets, labels = arrays["webp"], arrays["offsets"], arrays["labels"]
    blocks = [
        np.asarray(Image.open(io.BytesIO(webp[start:stop].tobytes())).convert("RGB")).reshape(-1, 32, 32, 3)
        for start, stop in pairwise(offsets)
    ]
    return np.concatenate(blocks), labels


TASK = ImageClassification(
    model,
    train=lambda: load("train"),
    query=lambda: load("test"),
    class_names=CLASSES,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
