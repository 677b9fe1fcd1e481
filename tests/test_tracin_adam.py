"""TracIn with Adam's second moments against gradients by autograd and the state of the optimizer that trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace import CheckpointRecorder, Index, MismatchError, QueryError, gradients_reference, load_checkpoints
from gradtrace.basis import Basis, dense_basis, identity_basis, two_sided_basis
from gradtrace.fitted.adam import encode_preconditioned
from gradtrace.fitted.ekfac import choose_coordinates, fit_eigenbases, mean_squares
from gradtrace.fitted.fisher_batches import FisherBatch
from gradtrace.layers import Layer
from gradtrace_indexer import build_index
from test_full_gradients import MODELS, prepared
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(40), tiny.classes(5, seed=5)
STEPS = (2, 4, 6)


def network() -> nn.Module:
    """Biases, a norm, and a weight that no layer type covers."""
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.PReLU(4), nn.Linear(4, 3, bias=False))


class Trained:
    """An index of checkpoints that an optimizer left, and what was in it at each: v^ by parameter name."""

    def __init__(self, directory: Path, optimizer: Callable[..., torch.optim.Optimizer], **build: Any) -> None:
        self.task = ClassTask(network, ROWS)
        torch.manual_seed(0)
        model = network()
        steps = optimizer(model.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-3)
        recorder = CheckpointRecorder(directory / "checkpoints", every=2, optimizer_state=True)
        self.moments: list[dict[str, Tensor]] = []
        for step in range(1, STEPS[-1] + 1):
            steps.zero_grad()
            self.task.loss(model, self.task.collate(ROWS[:8])).mean().backward()
            steps.step()
            recorder.step(model, steps)
            if step in STEPS:
                state = [steps.state[parameter]["exp_avg_sq"].double() for parameter in model.parameters()]
                names = [name for name, _ in model.named_parameters()]
                self.moments.append({name: v / (1 - 0.95**step) for name, v in zip(names, state, strict=True)})
        self.checkpoints = load_checkpoints(directory / "checkpoints")
        arguments = {"basis": "none", "precision": "float16", **build}
        self.path = directory / "index"
        self.index: Index = build_index(self.task, self.checkpoints, self.path, progress=False, **arguments)

    def expected(self, weights: Any = (0.02, 0.02, 0.02)) -> tuple[Tensor, Tensor]:
        """The scores, and what bounds the sums of absolute values. Each [queries, rows]."""
        total, size = torch.zeros(5, 40, dtype=torch.float64), torch.zeros(5, 40, dtype=torch.float64)
        for checkpoint, moments, weight in zip(self.checkpoints, self.moments, weights, strict=True):
            model = tiny.loaded(self.task, checkpoint)
            rows, queries = (gradients_reference(self.task, model, some) for some in (ROWS, QUERIES))
            divided = {name: g / (moments[name].sqrt() + 1e-3) for name, g in queries.items()}
            q, r = tiny.flat(divided), tiny.flat(rows)
            total += weight * q @ r.T
            size += weight * q.norm(dim=1)[:, None] * r.norm(dim=1)
        return total, size


def agrees(found: Any, wanted: Tensor, size: Tensor) -> None:
    assert (np.abs(found - wanted.numpy()) <= 1e-3 * size.numpy()).all()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("basis", ["none", "spectral", "gauss-newton"])
def test_scores_are_those_of_adams_steps(tmp_path: Path, optimizer: Any, basis: str) -> None:
    trained = Trained(tmp_path, optimizer, basis=basis, dimensions=1000)
    agrees(trained.index.scores(QUERIES, method="tracin-adam"), *trained.expected())
    by_steps = trained.index.scores(QUERIES, method="tracin-adam", weights="learning_rate_steps")
    agrees(by_steps, *trained.expected((0.04, 0.04, 0.04)))
    one = trained.index.scores(QUERIES, method="tracin-adam", checkpoints=["step-000000004.safetensors"])
    agrees(one, *trained.expected((0, 0.02, 0)))
    alone = trained.index.scores(QUERIES[2:3], method="tracin-adam")
    np.testing.assert_allclose(alone[0], trained.index.scores(QUERIES, method="tracin-adam")[2], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_answer_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path, torch.optim.Adam)
    with pytest.raises(QueryError, match=r"no self-influence: .* Ask with the training example as a query"):
        trained.index.self_influence(method="tracin-adam")
    with pytest.raises(QueryError, match="leave rescore out"):
        trained.index.influence(QUERIES, method="tracin-adam", rescore=True)
    assert "tracin-adam" not in tiny.build(trained.task, tmp_path / "other").methods
    with pytest.raises(QueryError, match=r"1\.pt has no second moments of Adam's beside it: record with"):
        tiny.build(trained.task, tmp_path / "other").scores(QUERIES, method="tracin-adam")


@pytest.mark.parametrize("change", ["other", "missing"])
def test_moments_that_are_not_those_that_were_indexed_are_refused(tmp_path: Path, change: str) -> None:
    trained = Trained(tmp_path, torch.optim.Adam)
    file = tmp_path / "checkpoints" / "step-000000004.optimizer.safetensors"
    file.unlink()
    if change == "other":
        file.write_bytes((tmp_path / "checkpoints" / "step-000000002.optimizer.safetensors").read_bytes())
    trained.index.scores(QUERIES)
    with pytest.raises(MismatchError, match=r"step-000000004\.safetensors are not those that were there when"):
        trained.index.scores(QUERIES, method="tracin-adam")


def bases(layers: list[Layer], spectral: Basis) -> dict[str, Basis]:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(spectral.coordinates, 9))[0]
    return {
        "none": identity_basis(layers, 0),
        "two-sided": two_sided_basis(layers, 40, 0),
        "gaussian": dense_basis(layers, "gaussian", 20, 0),
        "spectral": spectral,
        "gauss-newton": replace(spectral, kind="gauss-newton", dimensions=9, rotation=rotation),
    }


@pytest.mark.parametrize("case", MODELS)
def test_whole_gradients_have_the_coordinates_of_their_factors(case: str, tmp_path: Path) -> None:
    """In every basis, for every layer type: with factors of one, rows are what they always are."""
    model, rows, queries = prepared(case, tmp_path)
    fitted = fit_eigenbases(model, iter([FisherBatch(model.batch(rows), torch.ones(len(rows)))]))
    layers = model.plan.layers
    energies = mean_squares(model, iter([model.batch(rows)]), fitted)
    batch = model.batch(queries)
    ones = {layer.name: torch.ones(layer.groups, layer.outputs, layer.inputs) for layer in layers}
    for name, basis in bases(layers, choose_coordinates(energies, fitted, 30, 0)).items():
        found, losses = encode_preconditioned(model, basis, batch, model.task.loss, ones)
        wanted, same = model.encode(basis, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)
        torch.testing.assert_close(losses.float(), same)
