"""TRAK against its formulas, with gradients of the model's output by autograd; and the life of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Index, QueryError, StoreError, open_index
from gradtrace.methods.trak import run_means
from gradtrace.store.manifest import CheckpointEntry, Manifest
from gradtrace_indexer import add_checkpoints, add_kernels, append_rows, compact, delete_rows, prune, roll_back, verify
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


def expected_mean(task: PairTask, weights: Sequence[Path]) -> Tensor:
    """Over checkpoints, at each in units of its typical 1 - p."""
    sizes = torch.stack([(1 - output_gradients(task, path, ROWS)[1]).square().mean().sqrt() for path in weights])
    scores = torch.stack([expected(task, path) / size for path, size in zip(weights, sizes, strict=True)])
    return scores.mean(0) / (1 / sizes).mean()


def built(task: PairTask, directory: Path, **arguments: Any) -> Index:
    tiny.build(task, directory, **arguments)
    add_kernels(directory / "index", damping=DAMPING, progress=False)
    return open_index(directory / "index", task)


def agrees(found: NDArray[np.float32], wanted: Tensor) -> None:
    """Within the rounding of float16 rows."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("basis", ["none", "spectral", "gauss-newton"])
def test_scores_are_the_papers(tmp_path: Path, basis: str) -> None:
    """At each checkpoint, and on average; coordinates that are all kept only rotate."""
    task = MarginTask(tiny.mlp, ROWS)
    index = built(task, tmp_path, basis=basis, dimensions=1000)
    files = [tmp_path / "checkpoints" / f"{number}.pt" for number in (1, 2)]
    agrees(index.scores(QUERIES, method="trak"), expected_mean(task, files))
    for file in files:
        agrees(index.scores(QUERIES, method="trak", checkpoints=[file.name]), expected(task, file))
    found = index.influence(QUERIES, method="trak", k=3)
    best = index.scores(QUERIES, method="trak").argsort(1)
    assert [[hit.row for hit in one.proponents] for one in found] == best[:, :-4:-1].tolist()
    assert [[hit.row for hit in one.opponents] for one in found] == best[:, :3].tolist()


def test_of_the_loss_it_explains_the_margin(tmp_path: Path) -> None:
    task = MarginTask(tiny.mlp, ROWS)
    index = built(task, tmp_path)
    margin = index.scores(QUERIES, method="trak")
    np.testing.assert_allclose(index.scores(QUERIES, method="trak", target="loss"), margin, rtol=1e-3, atol=1e-6)
    own = index.scores(ROWS, method="trak").diagonal()
    np.testing.assert_allclose(index.self_influence(method="trak"), own, rtol=2e-2)


class Scaled(ValueTask):
    c = 0.3


def test_of_a_linear_regression_it_is_the_first_order_effect_of_leaving_a_row_out(tmp_path: Path) -> None:
    """On the prediction of the ridge regression, away from the label, in units of 1 / sqrt(2 c)."""
    rows, queries = tiny.values(50), tiny.values(6, seed=3)
    task = Scaled(lambda: nn.Linear(5, 1, bias=False), rows)
    index = built(task, tmp_path, count=1)
    theta = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints", 1)[0]).weight[0].detach().double()
    x, y = torch.stack([x for x, _ in rows]).double(), torch.stack([y for _, y in rows]).double()
    gradients = 2 * task.c * (x @ theta - y)[:, None] * x
    asked = (2 * task.c) ** 0.5 * torch.stack([(q.double() @ theta - t).sign() * q for q, t in queries]).double()
    hessian = 2 * task.c * x.T @ x
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(5)
    agrees(index.scores(queries, method="trak"), asked @ torch.linalg.solve(hessian, gradients.T))


def test_runs_count_alike() -> None:
    entries = [
        CheckpointEntry(name=str(number), file="", step=number, learning_rate=0.1, sha256="", run=run)
        for number, run in enumerate([0, 0, 0, 1])
    ]
    assert run_means(entries, [0, 1, 2, 3]).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert run_means(entries, [1, 3]).tolist() == [0.5, 0.5]


def test_an_index_answers_while_it_has_all_kernels(tmp_path: Path) -> None:
    """A new checkpoint has none at first; those of the others stay as they are."""
    task, path = MarginTask(tiny.mlp, ROWS), tmp_path / "index"
    index = tiny.build(task, tmp_path)
    assert "trak" not in index.methods
    with pytest.raises(QueryError, match=r"has no kernel of 1\.pt: run `gradtrace kernels`"):
        index.scores(QUERIES, method="trak")
    first = add_kernels(path, damping=DAMPING, progress=False)
    assert add_kernels(path, damping=DAMPING, progress=False) == first
    new = tiny.checkpoints(task, tmp_path / "checkpoints", 3)
    index = add_checkpoints(path, task, new, progress=False)
    with pytest.raises(QueryError, match=r"has no kernel of 3\.pt"):
        index.scores(QUERIES, method="trak")
    assert open_index(path, task).manifest.kernels == first.kernels
    assert {*kernel_files(first)} < {*kernel_files(add_kernels(path, damping=DAMPING, progress=False))}
    index = open_index(path, task)
    agrees(index.scores(QUERIES, method="trak"), expected_mean(task, [checkpoint.path for checkpoint in new]))
    with pytest.raises(StoreError, match="damping must be a number above zero, not 0"):
        add_kernels(path, damping=0)
    other = add_kernels(path, damping=2 * DAMPING, progress=False)
    assert not {*kernel_files(other)} & {*kernel_files(first)}
    assert verify(path, all_generations=True) == []


def kernel_files(manifest: Manifest) -> list[str]:
    assert manifest.kernels is not None
    return [entry.path for entry in manifest.kernels.files.values()]


def test_kernels_are_of_the_rows_that_are_there(tmp_path: Path) -> None:
    """Deleting and appending rows makes them stale, compacting does not; they come back with their generation."""
    task, path = MarginTask(tiny.mlp, ROWS), tmp_path / "index"
    reader = built(task, tmp_path, count=1)
    before = reader.scores(QUERIES, method="trak")
    deleted = delete_rows(path, [3, 4, 59])
    assert deleted.kernels is None
    add_kernels(path, damping=DAMPING, progress=False)
    left = np.setdiff1d(np.arange(60), [3, 4, 59])
    wanted = expected(task, tmp_path / "checkpoints" / "1.pt", [ROWS[row] for row in left])
    agrees(open_index(path, task).scores(QUERIES, method="trak")[:, left], wanted)
    compacted = compact(path, progress=False)
    assert compacted.kernels is not None
    agrees(open_index(path, task).scores(QUERIES, method="trak")[:, left], wanted)
    grown = MarginTask(tiny.mlp, [*ROWS, *tiny.classes(5, seed=9)])
    assert "trak" not in append_rows(path, grown, progress=False).methods
    roll_back(path, 2)
    np.testing.assert_array_equal(open_index(path, task).scores(QUERIES, method="trak"), before)
    prune(path)
    assert [file.name for file in (path / "kernels").iterdir()] == ["1.pt.2.safetensors"]
    np.testing.assert_array_equal(reader.scores(QUERIES, method="trak"), before)
    damaged = path / "kernels" / "1.pt.2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert len(verify(path)) == 1


def test_an_index_whose_deleted_kernel_was_open_still_answers(tmp_path: Path) -> None:
    task, path = MarginTask(tiny.mlp, ROWS), tmp_path / "index"
    reader = built(task, tmp_path, count=1)
    before = reader.scores(QUERIES, method="trak")
    delete_rows(path, [1])
    prune(path)
    assert not list((path / "kernels").iterdir())
    np.testing.assert_array_equal(reader.scores(QUERIES, method="trak"), before)


class Negative(ValueTask):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return -super().loss(model, batch)


class OneLogit(ClassTask):
    """Class labels, and a real value for a prediction."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, :1]


class NoLabels(PairTask):
    def label(self, example: Any) -> None:
        return None


def margin(model: nn.Module, batch: Any) -> Tensor:
    """No loss of PyTorch's."""
    return F.relu(1 - model(batch[0])[:, 0])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Negative(tiny.value_mlp, tiny.values(9)), "losses are below zero"),
        (OneLogit(tiny.mlp, ROWS), "both whole numbers or both real"),
        (NoLabels(tiny.mlp, ROWS, margin), "both whole numbers or both real"),
        (ValueTask(lambda: nn.Linear(5, 1, bias=False), [(torch.zeros(5), torch.ones(()))] * 3), "rows are zero"),
    ],
)
def test_losses_without_a_known_output_are_refused(tmp_path: Path, task: PairTask, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all gradients are zero
        tiny.build(task, tmp_path, count=1)
    with pytest.raises(StoreError, match=message):
        add_kernels(tmp_path / "index", progress=False)


def test_tasks_without_predictions_have_kernels(tmp_path: Path) -> None:
    agrees_with = built(PairTask(tiny.mlp, ROWS), tmp_path / "a").scores(QUERIES, method="trak")
    np.testing.assert_array_equal(
        built(ClassTask(tiny.mlp, ROWS), tmp_path / "b").scores(QUERIES, method="trak"), agrees_with
    )


def test_certain_predictions_leave_the_kernel_finite(tmp_path: Path) -> None:
    """A loss that float32 rounds to zero tells no 1 - p."""
    task = MarginTask(lambda: nn.Linear(5, 3), [*ROWS, *((100 * torch.ones(5), label % 3) for label in range(9))])
    with pytest.warns(UserWarning, match="the loss in float64"):
        index = built(task, tmp_path, count=2)
    assert (index.columns["loss"] == 0).any()
    assert np.isfinite(index.scores(QUERIES, method="trak")).all()
