"""Small tasks of other kinds than `examples/mnist6k` that are retrained hundreds of times, for `benchmarks.lds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gradtrace.data.dataset import fetch
from gradtrace.task import Batch
from gradtrace.tasks import ImageClassification, TabularRegression

OnStep = Callable[[nn.Module, torch.optim.Optimizer], None]
_EXAMPLES = Path(__file__).parents[1] / "examples"
CIFAR_EPOCHS, HOUSING_EPOCHS, BATCH_SIZE = 12, 40, 64


def convolutional_network() -> nn.Module:
    """70,000 weights, without batch norm: its statistics would depend on the subset."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


class CIFAR5k(ImageClassification):
    """A tenth of CIFAR-10; explains the margin of the right class."""

    def __init__(self) -> None:
        example = run_path(str(_EXAMPLES / "cifar10" / "task.py"))
        super().__init__(
            convolutional_network,
            train=lambda: drawn(example["load"]("train"), 5_000),  # the files are sorted by class
            query=lambda: drawn(example["load"]("test"), 300),
            class_names=example["CLASSES"],
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        )

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The negative margin (Park et al. 2023, section 3.3)."""
        logits, labels = self.predict(model, batch), batch[1][:, None]
        return logits.scatter(1, labels, -torch.inf).logsumexp(1) - logits.gather(1, labels)[:, 0]

    def fit(self, rows: Sequence[int], seed: int, on_step: OnStep = lambda model, optimizer: None) -> nn.Module:
        """SGD with momentum, a constant learning rate, no augmentation."""
        images, labels = (part[torch.as_tensor(rows)] for part in self._training)

        def loss(model: nn.Module, picked: Tensor) -> Tensor:
            return F.cross_entropy(model(images[picked]), labels[picked])

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)

        return trained(self.model, optimizer, loss, len(rows), CIFAR_EPOCHS, seed, on_step)

    @cached_property
    def _training(self) -> tuple[Tensor, Tensor]:
        images, labels = self.collate(fetch(self.train, range(len(self.train))))
        return images.to(memory_format=torch.channels_last), labels


class Housing4k(TabularRegression):
    """4,000 block groups of California housing; explains the loss, a squared error."""

    def __init__(self) -> None:
        example = run_path(str(_EXAMPLES / "california" / "task.py"))
        given = example["TASK"]
        super().__init__(
            example["model"],
            train=lambda: tuple(part[:4_000] for part in example["load"]("train")),
            query=lambda: tuple(part[:300] for part in example["load"]("query")),
            feature_names=given.feature_names,
            categories={"ocean_proximity": example["PROXIMITY"]},
            fill={"total_bedrooms": 432},
            mean=(-119.57, 35.63, 28.65, 2636.6, 537.6, 1423.7, 499.9, 3.872),
            std=(2.005, 2.136, 12.58, 2188.4, 422.5, 1094.9, 383.7, 1.897),
            label_mean=207_264,
            label_std=116_021,
        )

    def fit(self, rows: Sequence[int], seed: int, on_step: OnStep = lambda model, optimizer: None) -> nn.Module:
        """SGD with momentum and a constant learning rate."""
        columns, prices = (part[torch.as_tensor(rows)] for part in self._training)

        def loss(model: nn.Module, picked: Tensor) -> Tensor:
            return self.loss(model, (columns[picked], prices[picked])).mean()

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        return trained(self.model, optimizer, loss, len(rows), HOUSING_EPOCHS, seed, on_step)

    @cached_property
    def _training(self) -> tuple[Tensor, Tensor]:
        columns, prices = self.collate(fetch(self.train, range(len(self.train))))
        return columns, prices


def drawn(arrays: Sequence[NDArray[Any]], count: int) -> tuple[NDArray[Any], ...]:
    """The same random rows of each array."""
    rows = np.random.default_rng(0).choice(len(arrays[0]), count, replace=False)
    return tuple(array[rows] for array in arrays)


def trained(
    make: Callable[[], nn.Module],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: int,
    epochs: int,
    seed: int,
    on_step: OnStep,
) -> nn.Module:
    """loss: of the rows at some positions, int64 [batch];  on_step: called after each of the optimizer's steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = optimizer_of(model)
        for _ in range(epochs):
            for picked in torch.randperm(rows).split(BATCH_SIZE):
                optimizer.zero_grad()
                loss(model, picked).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                on_step(model, optimizer)
    return model


CIFAR5K = CIFAR5k()
HOUSING4K = Housing4k()
