"""What a sample of rows does not show is found before an index is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from gradtrace import LossError
from gradtrace.data.sample import SAMPLE_ROWS
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace_indexer.generations import discard
from tiny import PairTask

ROWS = tiny.classes(120)


def looking_at_large_batches(model: nn.Module, batch: Any) -> Tensor:
    """The rows of batches larger than any that the sample is tried in count twice."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses * (2 if len(losses) > SAMPLE_ROWS else 1)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_rows_that_differ_in_large_batches_alone(tmp_path: Path, precision: str) -> None:
    task = PairTask(tiny.mlp, ROWS, looking_at_large_batches)
    with pytest.raises(LossError, match=r"training row\(s\) \d+.* alone, at checkpoint 1\.pt: nothing is published"):
        tiny.build(task, tmp_path, precision=precision)
    assert not (tmp_path / "index" / MANIFEST_NAME).exists()
    with pytest.raises(LossError, match="gradtrace discard"):  # what was written is not gone
        tiny.build(task, tmp_path, precision=precision, batch_size=SAMPLE_ROWS)
    discard(tmp_path / "index")
    tiny.build(task, tmp_path, precision=precision, batch_size=SAMPLE_ROWS)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
@pytest.mark.parametrize("basis", ["none", "gauss-newton", "spectral", "two-sided", "rademacher"])
def test_right_rows_pass(tmp_path: Path, precision: str, basis: str) -> None:
    tiny.build(PairTask(tiny.mlp, ROWS), tmp_path, precision=precision, basis=basis, dimensions=20)


def test_rows_whose_loss_is_all_but_zero_pass(tmp_path: Path) -> None:
    """Their gradients are differences of numbers near one, in which float32 leaves little that is right."""

    def saturated(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(8 * logits, logits.argmax(1), reduction="none")

    tiny.build(PairTask(lambda: nn.Linear(5, 3), ROWS, saturated), tmp_path, precision="int8")


def test_a_model_that_only_knows_float32_passes(tmp_path: Path) -> None:
    def in_single(model: nn.Module, batch: Any) -> Tensor:
        weight = torch.full((3,), 0.5, dtype=torch.float32)
        return F.cross_entropy(F.linear(model(batch[0]), torch.diag(weight)), batch[1], reduction="none")

    tiny.build(PairTask(tiny.mlp, ROWS, in_single), tmp_path, precision="int8")


class GatedSequences(nn.Module):
    """[batch, 5 steps, 5] -> [batch, 3]; a layer that sees steps folded into the batch, time first, behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gated, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = self.gated(x.transpose(0, 1).reshape(-1, 5)).view(5, -1, 5).transpose(0, 1)
        return self.head((x + self.gate * y).tanh().mean(1))


@pytest.mark.parametrize("gates", [(0.7, 0.0), (0.0, 0.7)])
def test_a_gate_that_is_closed_at_one_checkpoint(tmp_path: Path, gates: tuple[float, float]) -> None:
    """There the layer behind it has no gradient, which would show whose a position is."""
    rows = tiny.classes(40, (5, 5))
    task = PairTask(GatedSequences, rows)
    found = tiny.checkpoints(task, tmp_path / "checkpoints")
    for checkpoint, gate in zip(found, gates, strict=True):
        torch.save({**checkpoint.load(), "gate": torch.tensor(gate)}, checkpoint.path)
    index = tiny.build_index(task, found, tmp_path / "index", progress=False, basis="none", precision="float16")
    expected = np.zeros((2, len(rows)))
    for checkpoint in found:
        model = tiny.loaded(task, checkpoint)
        gradients = torch.stack([flat_gradient(model, task, row) for row in rows]).double()
        expected += checkpoint.learning_rate * (gradients[:2] @ gradients.T).numpy()
    np.testing.assert_allclose(index.scores(rows[:2]), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


class GuardedGate(GatedSequences):
    """Runs with a gate that is closed, and with no other."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(self.gate != 0):
            raise ValueError("the gate is open")
        return super().forward(x)


def test_a_model_that_runs_at_its_own_weights_alone(tmp_path: Path) -> None:
    task = PairTask(GuardedGate, tiny.classes(40, (5, 5)))
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 1)
    torch.save({**found[0].load(), "gate": torch.tensor(0.0)}, found[0].path)
    tiny.build_index(task, found, tmp_path / "index", progress=False, basis="none", precision="float16")


def flat_gradient(model: nn.Module, task: PairTask, row: tuple[Tensor, int]) -> Tensor:
    loss = task.loss(model, (row[0][None], torch.tensor([row[1]])))
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss.sum(), list(model.parameters()))])
