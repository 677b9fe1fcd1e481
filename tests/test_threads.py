"""Tasks that keep a state between calls are right, on one thread and on several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from tiny import PairTask

ROWS = tiny.classes(96)


class KeepsState(PairTask):
    """What the loss computes is used by the next call, through an attribute and through one that is a container."""

    def __init__(self) -> None:
        super().__init__(tiny.mlp, ROWS)
        self.kept: dict[str, Tensor] = {}

    def _scale(self, model: nn.Module, batch: Any) -> None:
        self.kept["scale"] = 1 + batch[0].square().sum(1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self._scale(model, batch)
        self.logits = model(batch[0])
        losses = F.cross_entropy(self.logits, batch[1], reduction="none")
        return losses * self.kept["scale"]

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_scores_of_a_task_with_a_state(tmp_path: Path, threads: int) -> None:
    task = KeepsState()
    index = tiny.build(task, tmp_path, count=4, batch_size=4)
    checkpoints = tiny.checkpoints(task, tmp_path / "checkpoints", 4)
    expected = np.zeros((8, len(ROWS)))
    for checkpoint in checkpoints:
        rows = torch.stack([gradient(tiny.loaded(task, checkpoint), row) for row in ROWS])
        expected += checkpoint.learning_rate * (rows[:8] @ rows.T).numpy()
    for _ in range(3):
        np.testing.assert_allclose(index.scores(ROWS[:8]), expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())
    assert task.kept == {}, "the task itself is left as it was"


def gradient(model: nn.Module, row: tuple[Tensor, int]) -> Tensor:
    """Of one example, by autograd. [parameters]"""
    loss = F.cross_entropy(model(row[0]), torch.tensor(row[1])) * (1 + row[0].square().sum())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
