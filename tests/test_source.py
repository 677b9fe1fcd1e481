"""SOURCE against the derivative of unrolled training, closed forms, and the factors calculated a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, Index, QueryError
from gradtrace.checkpoints import Optimizer
from gradtrace.methods.source import Course, unrolled
from gradtrace_indexer import build_index
from tiny import ClassTask, ValueTask

ROWS, QUERIES = tiny.values(40), tiny.values(4, seed=5)
X, Y = torch.stack([x for x, _ in ROWS]).double(), torch.stack([y for _, y in ROWS]).double()
RATE, STEPS = 2e-3, 600  # so small a rate that steps are nearly a flow, as the theory takes them
Doubles = NDArray[np.float64]


def linear() -> nn.Module:
    return nn.Linear(5, 1, bias=False)


def index_of(directory: Path, path: list[Tensor], steps: list[int], rate: float, optimizer: Optimizer | None) -> Index:
    """Of a linear regression's weights [5] along a training."""
    task, found = ValueTask(linear, ROWS), []
    (directory / "checkpoints").mkdir(parents=True)
    for step in steps:
        file = directory / "checkpoints" / f"{step}.pt"
        torch.save({"weight": path[step][None].float()}, file)
        found.append(Checkpoint(file, step, rate, optimizer))
    return build_index(task, found, directory / "index", precision="float16", progress=False)


def trained(
    start: Tensor, steps: int, momentum: float = 0.0, decay: float = 0.0, weights: Tensor | None = None
) -> list[Tensor]:
    """Full-batch gradient descent on the mean of (x . w - y)^2, each row's loss times its weight."""
    weights = torch.ones(len(X), dtype=torch.float64) if weights is None else weights
    path, velocity = [start], torch.zeros_like(start)
    for _ in range(steps):
        gradient = 2 * ((path[-1] @ X.T - Y) * weights) @ X / len(X) + decay * path[-1]
        velocity = momentum * velocity + gradient
        path.append(path[-1] - RATE * velocity)
    return path


def unrolled_influence(start: Tensor, **settings: float) -> Tensor:
    """- d (query's loss after training) / d (weight of a row), times the number of rows. [queries, rows]."""
    weights = torch.ones(len(X), dtype=torch.float64, requires_grad=True)
    final = trained(start, STEPS, weights=weights, **settings)[-1]
    losses = [(x.double() @ final - y.double()).square() for x, y in QUERIES]
    return torch.stack([-len(X) * torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses])


def optimum(decay: float = 0.0) -> Tensor:
    return torch.linalg.solve(X.T @ X + decay * len(X) / 2 * torch.eye(5, dtype=torch.float64), X.T @ Y)


def assert_close(found: NDArray[np.float32], expected: Tensor, error: float) -> None:
    assert np.linalg.norm(found - expected.numpy()) < error * np.linalg.norm(expected.numpy())


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"decay": 0.5}, {"momentum": 0.5, "decay": 0.5}], ids=str)
def test_one_segment_is_the_unrolled_training_of_a_converged_quadratic(
    tmp_path: Path, settings: dict[str, float]
) -> None:
    """There gradients and curvature do not change, so that the theory lacks nothing but the steps' finite size. The
    training is far from its limit in the flatter directions: 1 / curvature would be wrong."""
    start = optimum(settings.get("decay", 0.0))
    optimizer = Optimizer("sgd", settings.get("momentum", 0.0), settings.get("decay", 0.0))
    index = index_of(tmp_path, trained(start, STEPS, **settings), [STEPS], RATE, optimizer)
    scores = index.scores(QUERIES, method="source", segments=1)
    assert_close(scores, unrolled_influence(start, **settings), 0.02)


@pytest.mark.parametrize(("count", "error"), [(3, 0.4), (30, 0.05)])
def test_many_segments_are_the_unrolled_training_on_its_way(tmp_path: Path, count: int, error: float) -> None:
    """From random weights: the more checkpoints and segments, the less a gradient changes within one."""
    start = torch.arange(5).double() - 2
    steps = [STEPS * number // count for number in range(1, count + 1)]
    index = index_of(tmp_path, trained(start, STEPS), steps, RATE, None)
    assert_close(index.scores(QUERIES, method="source", segments=count), unrolled_influence(start), error)
