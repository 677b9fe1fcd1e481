"""SOURCE against the derivative of unrolled training, closed forms, and its factors calculated a second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, Index, QueryError, Task, gradients_reference, load_checkpoints
from gradtrace.checkpoints import Optimizer
from gradtrace.methods.source import Course, unrolled
from gradtrace.recorder import CheckpointRecorder
from gradtrace_indexer import add_checkpoints, build_index, discard, prune
from gradtrace_indexer import generations as generations
from tiny import ClassTask, PairTask

Doubles = NDArray[np.float64]
RATE, STEPS = 2e-3, 600  # so small a rate that steps are nearly a flow, as the theory takes them
BEST = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5]).double()
POINTS = torch.stack([x for x, _ in tiny.classes(30)]).double() * torch.tensor([1.0, 0.3, 2.0, 0.1, 0.6])
# Each point twice, with labels above and below the line by so much that squared gradients are the curvature: a task
# that predicts nothing has its Fisher from its own labels.
INPUTS = POINTS.repeat(2, 1)
LABELS = POINTS.repeat(2, 1) @ BEST + torch.tensor([0.5**0.5, -(0.5**0.5)]).double().repeat_interleave(len(POINTS))
QUERIES = tiny.values(4, seed=5)


class Line(PairTask):
    def __init__(self) -> None:
        rows = list(zip(INPUTS.float(), LABELS.float(), strict=True))
        super().__init__(lambda: nn.Linear(5, 1, bias=False), rows, self.squared_error)

    def squared_error(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]).flatten() - batch[1]).square()


def trained(
    start: Tensor, momentum: float = 0.0, decay: float = 0.0, weights: Tensor | None = None, scale: Tensor | None = None
) -> list[Tensor]:
    """Full-batch gradient descent on the mean squared error, each row's loss times its weight: all weights [5].

    scale: [5], of a preconditioner; the decay is then beside the loss
    """
    weights = torch.ones(len(INPUTS)).double() if weights is None else weights
    path, velocity = [start], torch.zeros_like(start)
    for _ in range(STEPS):
        gradient = 2 * ((path[-1] @ INPUTS.T - LABELS) * weights) @ INPUTS / len(INPUTS)
        gradient = gradient + decay * path[-1] if scale is None else scale * gradient + decay * path[-1]
        velocity = momentum * velocity + gradient
        path.append(path[-1] - RATE * velocity)
    return path


def unrolled_influence(start: Tensor, **settings: float | Tensor) -> Tensor:
    """- d (query's loss after training) / d (weight of a row), times the number of rows. [queries, rows]."""
    weights = torch.ones(len(INPUTS)).double().requires_grad_(True)
    final = trained(start, weights=weights, **settings)[-1]  # type: ignore[arg-type]
    losses = [(x.double() @ final - y.double()).square() for x, y in QUERIES]
    return torch.stack([-len(INPUTS) * torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses])


def line_index(directory: Path, weights: list[Tensor], steps: list[int], optimizer: Optimizer | None = None) -> Index:
    found = []
    for step, values in zip(steps, weights, strict=True):
        torch.save({"weight": values[None].float()}, directory / f"{step}.pt")
        found.append(Checkpoint(directory / f"{step}.pt", step, RATE, optimizer))
    return build_index(Line(), found, directory / "index", precision="float16", progress=False)


def difference(found: NDArray[np.float32] | Doubles, expected: Tensor) -> float:
    """Relative, over all of them."""
    return float(np.linalg.norm(found - expected.numpy()) / expected.norm())


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "decay": 0.5}], ids=str)
def test_one_segment_is_the_unrolled_training_of_a_converged_quadratic(
    tmp_path: Path, settings: dict[str, float]
) -> None:
    """There gradients and curvature do not change, so the theory lacks nothing but the steps' finite size. Training has
    not gone on for long enough for 1 / curvature to be right in the flatter directions."""
    curvature = 2 * INPUTS.T @ INPUTS / len(INPUTS)
    decay = settings.get("decay", 0.0) * torch.eye(5).double()
    best = torch.linalg.solve(curvature + decay, curvature @ BEST)
    optimizer = Optimizer("sgd", settings.get("momentum", 0.0), settings.get("decay", 0.0))
    index = line_index(tmp_path, [best], [STEPS], optimizer)
    expected = unrolled_influence(best, **settings)
    found = index.scores(QUERIES, method="source")
    if not decay.any():  # else the residuals at the optimum, and so the Fisher, are no more those that were made
        assert difference(found, expected) < 0.02
        rows = torch.stack([2 * (x @ best - y) * x for x, y in zip(INPUTS, LABELS, strict=True)])
        queries = torch.stack([2 * (x.double() @ best - y.double()) * x.double() for x, y in QUERIES])
        assert difference((queries @ torch.linalg.inv(curvature) @ rows.T).numpy(), expected) > 0.2
    eigenvalues, axes = torch.linalg.eigh(curvature + decay)
    length = RATE * STEPS / (1 - settings.get("momentum", 0.0))
    factors = torch.from_numpy(
        unrolled(Course(np.array([length]), eigenvalues[None].numpy(), np.ones((1, 5)), np.zeros(1)), 1)
    )
    rows = torch.stack([2 * (x @ best - y) * x for x, y in zip(INPUTS, LABELS, strict=True)])
    queries = torch.stack([2 * (x.double() @ best - y.double()) * x.double() for x, y in QUERIES])
    assert difference(((queries @ axes * factors) @ (rows @ axes).T).numpy(), expected) < 0.02
