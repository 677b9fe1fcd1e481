"""A tenth of MNIST, a network of 109,000 weights, and how it is trained: small enough to retrain hundreds of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.task import Batch
from gradtrace.tasks import ImageClassification, data_file

EPOCHS, BATCH_SIZE = 18, 64
OnStep = Callable[[nn.Module, torch.optim.Optimizer], None]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def load(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(data_file(f"mnist-{split}.npz")) as arrays:
        return arrays["images"][:count], arrays["labels"][:count]


class MNIST6k(ImageClassification):
    """Classifies digits; explains the margin of the right class, and can be retrained on some of the rows.

    Args:
        to_zero: train with a learning rate that falls linearly to zero, instead of a constant one.
    """

    def __init__(self, to_zero: bool = False) -> None:
        self.to_zero = to_zero
        super().__init__(
            network,
            train=lambda: load("train", 6_000),
            query=lambda: load("test", 300),
            class_names=[str(digit) for digit in range(10)],
            mean=0.1307,
            std=0.3081,
        )

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The negative margin: the logarithm of the odds against the label (Park et al. 2023, section 3.3)."""
        logits = self.predict(model, batch)
        labels = batch[1][:, None]
        return logits.scatter(1, labels, -torch.inf).logsumexp(1) - logits.gather(1, labels)[:, 0]

    def fit(self, rows: Sequence[int], seed: int, on_step: OnStep = lambda model, optimizer: None) -> nn.Module:
        """SGD with momentum; `on_step` is called after each of its steps, before the learning rate moves on."""
        inputs, labels = (part[torch.as_tensor(rows)] for part in self._training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
            steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
            last = 0.0 if self.to_zero else 1.0
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, total_iters=max(steps, 1))
            for _ in range(EPOCHS):
                for some in torch.randperm(len(rows)).split(BATCH_SIZE):
                    optimizer.zero_grad()
                    F.cross_entropy(model(inputs[some]), labels[some]).backward()
                    optimizer.step()
                    on_step(model, optimizer)
                    schedule.step()
        return model

    @cached_property
    def _training(self) -> tuple[Tensor, Tensor]:
        """Images float32 [rows, 1, 28, 28] and labels int64 [rows], normalised once."""
        inputs, labels = self.collate(self.train.__getitems__(range(len(self.train))))
        return inputs, labels


TASK = MNIST6k()
TO_ZERO = MNIST6k(to_zero=True)
