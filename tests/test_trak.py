"""TRAK against its formulas, with gradients of the model's output by autograd in float64; and the life of its kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Index, QueryError, StoreError, open_index
from gradtrace.manifest import Manifest, read_manifest
from gradtrace.methods.trak import run_means
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    compact,
    delete_rows,
    prune,
    roll_back,
    set_searcher,
    verify,
)
from tiny import ClassTask, PairTask, ValueTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
DAMPING = 0.1


class MarginTask(ClassTask):
    """Explains the negative margin, log((1 - p) / p), as the paper does."""

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return -margins(model, *batch)


def margins(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of the labels. [batch]."""
    chosen = model(inputs).log_softmax(1).gather(1, labels[:, None])[:, 0]
    return chosen - torch.log1p(-chosen.exp())


def output_gradients(task: PairTask, weights: Path, examples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Gradients of the margins by all parameters, float64 [n, parameters], and p [n]."""
    model = task.model().double()
    model.load_state_dict(torch.load(weights))
    inputs = torch.stack([x for x, _ in examples]).double()
    labels = torch.tensor([y for _, y in examples])
    found = margins(model, inputs, labels)
    rows = [torch.autograd.grad(f, [*model.parameters()], retain_graph=True) for f in found]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).detach(), found.sigmoid().detach()


def expected(task: PairTask, weights: Path, rows: Sequence[Any] = ROWS) -> Tensor:
    """phi(q)^T (Phi^T Phi + damping)^-1 phi(z) (1 - p_z). [queries, rows]."""
    phi, p = output_gradients(task, weights, rows)
    queries, _ = output_gradients(task, weights, QUERIES)
    kernel = phi.T @ phi
    kernel += DAMPING * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
    return queries @ torch.linalg.solve(kernel, phi.T) * (1 - p)


def built(task: PairTask, directory: Path, **arguments: Any) -> Index:
    tiny.build(task, directory, **arguments)
    add_kernels(directory / "index", damping=DAMPING, progress=False)
    return open_index(directory / "index", task)


def agrees(found: NDArray[np.float32], wanted: Tensor) -> None:
    """Within the rounding of float16 rows."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("basis", ["none", "spectral"])
def test_scores_are_the_papers(tmp_path: Path, basis: str) -> None:
    """At each checkpoint, and on average; spectral coordinates that are all kept only rotate."""
    task = MarginTask(tiny.mlp, ROWS)
    index = built(task, tmp_path, basis=basis, dimensions=1000)
    each = [expected(task, tmp_path / "checkpoints" / f"{number}.pt") for number in (1, 2)]
    agrees(index.scores(QUERIES, method="trak"), (each[0] + each[1]) / 2)
    for name, wanted in zip(("1.pt", "2.pt"), each, strict=True):
        agrees(index.scores(QUERIES, method="trak", checkpoints=[name]), wanted)
    found = index.influence(QUERIES, method="trak", k=3)
    best = index.scores(QUERIES, method="trak").argsort(1)
    assert [[hit.row for hit in one.proponents] for one in found] == best[:, :-4:-1].tolist()
    assert [[hit.row for hit in one.opponents] for one in found] == best[:, :3].tolist()


def test_the_loss_changes_by_the_margins_change_times_one_less_p(tmp_path: Path) -> None:
    task = MarginTask(tiny.mlp, ROWS)
    index = built(task, tmp_path, count=1)
    _, p = output_gradients(task, tmp_path / "checkpoints" / "1.pt", QUERIES)
    wanted = (1 - p)[:, None] * expected(task, tmp_path / "checkpoints" / "1.pt")
    agrees(index.scores(QUERIES, method="trak", target="loss"), wanted)
    own = index.scores(ROWS[:5], method="trak", target="loss")
    np.testing.assert_allclose(index.self_influence(method="trak")[:5], own.diagonal(), rtol=2e-2)


class Scaled(ValueTask):
    c = 0.3


def test_of_a_linear_regression_it_is_the_first_order_effect_of_leaving_a_row_out(tmp_path: Path) -> None:
    """Of the ridge regression, whatever the loss's factor."""
    rows, queries = tiny.values(50), tiny.values(6, seed=3)
    task = Scaled(lambda: nn.Linear(5, 1, bias=False), rows)
    index = built(task, tmp_path, count=1)
    theta = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints", 1)[0]).weight[0].detach().double()
    x, y = torch.stack([x for x, _ in rows]).double(), torch.stack([y for _, y in rows]).double()
    gradients = 2 * task.c * (x @ theta - y)[:, None] * x
    asked = torch.stack([2 * task.c * (q.double() @ theta - t) * q for q, t in queries])
    hessian = 2 * task.c * x.T @ x
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(5)
    agrees(index.scores(queries, method="trak"), asked @ torch.linalg.solve(hessian, gradients.T))


def test_runs_count_alike() -> None:
    entries = read_entries([0, 0, 0, 1])
    assert run_means(entries, [0, 1, 2, 3]).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert run_means(entries, [1, 3]).tolist() == [0.5, 0.5]


def read_entries(runs: Sequence[int]) -> list[Any]:
    from gradtrace.manifest import CheckpointEntry

    return [
        CheckpointEntry(name=str(number), file="", step=number, learning_rate=0.1, sha256="", run=run)
        for number, run in enumerate(runs)
    ]
