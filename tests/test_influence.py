"""Influence functions against matrices formed in the space of the parameters, and against leaving rows out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, Index, QueryError, gradients_reference
from gradtrace_indexer import build_index
from tiny import ClassTask, ValueTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
Doubles = NDArray[np.float64]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path_factory.mktemp("influence"), basis="spectral")


class Factors(NamedTuple):
    """Of one layer at all rows. a: inputs [n, in + 1], d: gradients at the outputs for each label [n, labels, out]."""

    a: Doubles
    d: Doubles
    chances: Doubles  # [n, labels]

    def rotation(self) -> Doubles:
        """Eigenvectors over the layer's parameters, out by in with the bias last."""
        outputs = np.einsum("nl,nli,nlj->ij", self.chances, self.d, self.d)
        return np.kron(np.linalg.eigh(outputs)[1], np.linalg.eigh(self.a.T @ self.a)[1])

    def eigenvalues(self, rotation: Doubles) -> Doubles:
        gradients = np.einsum("nlo,ni->nloi", self.d, self.a).reshape(*self.chances.shape, -1)
        return np.einsum("nl,nlk->k", self.chances, (gradients @ rotation) ** 2) / len(self.a)


def layer_factors(state: dict[str, Tensor]) -> list[Factors]:
    w1, b1, w2, b2 = (state[name].double().numpy() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    x = np.stack([row.double().numpy() for row, _ in ROWS])
    hidden = np.tanh(x @ w1.T + b1)
    logits = hidden @ w2.T + b2
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    d2 = chances[:, None, :] - np.eye(3)
    d1 = (d2 @ w2) * (1 - hidden**2)[:, None, :]
    ones = np.ones((len(x), 1))
    return [Factors(np.concatenate([a, ones], axis=1), d, chances) for a, d in ((x, d1), (hidden, d2))]


def ekfac_inverse(reference: dict[str, Tensor], state: dict[str, Tensor], damping: float) -> Doubles:
    """EK-FAC as one matrix over all parameters, inverted: rotations at the reference, eigenvalues at `state`."""
    blocks = []
    for basis, own in zip(layer_factors(reference), layer_factors(state), strict=True):
        rotation = basis.rotation()
        values = own.eigenvalues(rotation)
        blocks.append(np.linalg.inv(rotation @ np.diag(values + damping * values.mean()) @ rotation.T))
    return scipy.linalg.block_diag(*blocks)  # type: ignore[no-any-return]


def expected(index: Index, checkpoint: int, damping: float) -> tuple[Doubles, Doubles]:
    """Scores [queries, rows] and of each row on itself [rows], by an explicit inverse."""
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, index.directory.parent / "checkpoints")
    inverse = ekfac_inverse(found[-1].load(), found[checkpoint].load(), damping)
    model = tiny.loaded(task, found[checkpoint])
    q, g = (in_order(gradients_reference(task, model, some)) for some in (QUERIES, ROWS))
    return q @ inverse @ g.T, ((g @ inverse) * g).sum(1)


def in_order(gradients: dict[str, Tensor]) -> Doubles:
    """Layer by layer, out by in, the bias last. [examples, parameters]."""
    layers = [torch.cat([gradients[f"{n}.weight"], gradients[f"{n}.bias"][:, :, None]], dim=2) for n in (0, 2)]
    return torch.cat([layer.flatten(1) for layer in layers], dim=1).numpy()


def agree(found: NDArray[np.float32], wanted: Doubles, tolerance: float = 2e-3) -> None:
    assert found.dtype == np.float32
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_scores_are_those_of_the_explicit_inverse(index: Index, damping: float) -> None:
    scores, own = expected(index, 1, damping)
    agree(index.scores(QUERIES, method="influence", damping=damping), scores)
    agree(index.self_influence(method="influence", damping=damping), own)


def test_several_checkpoints_are_summed(index: Index) -> None:
    found = index.scores(QUERIES, method="influence", damping=0.1, checkpoints=["1.pt", "2.pt"])
    agree(found, expected(index, 0, 0.1)[0] + expected(index, 1, 0.1)[0])


def test_much_damping_leaves_the_inner_products_of_each_layer(index: Index) -> None:
    """Divided by the damping times its mean eigenvalue."""
    products, damping = torch.zeros(len(QUERIES), len(ROWS), dtype=torch.float64), 1e6
    state = tiny.checkpoints(index.task, index.directory.parent / "checkpoints")[-1].load()
    model = tiny.mlp()
    model.load_state_dict(state)
    q, g = (gradients_reference(index.task, model, some) for some in (QUERIES, ROWS))
    for number, factors in zip((0, 2), layer_factors(state), strict=True):
        mean = factors.eigenvalues(factors.rotation()).mean()
        for name in (f"{number}.weight", f"{number}.bias"):
            products += q[name].flatten(1) @ g[name].flatten(1).T / mean
    agree(index.scores(QUERIES, method="influence", damping=damping), products.numpy() / damping)


def test_queries_alone_and_together(index: Index) -> None:
    together = index.influence(QUERIES, method="influence", k=5)
    for query, result in zip(QUERIES, together, strict=True):
        (alone,) = index.influence([query], method="influence", k=5)
        assert [hit.row for hit in alone.proponents] == [hit.row for hit in result.proponents]
        np.testing.assert_allclose(
            [hit.score for hit in alone.opponents], [hit.score for hit in result.opponents], rtol=1e-4
        )


def test_a_layer_without_curvature_adds_nothing(tmp_path: Path) -> None:
    """Its gradients are zero on all samples; nothing is divided by zero."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.unused(x)

    index = tiny.build(ClassTask(Gated, ROWS), tmp_path, basis="spectral", dimensions=1000)
    assert np.isfinite(index.scores(QUERIES, method="influence")).all()


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral"])
def test_ridge_regression_without_each_row(tmp_path: Path, basis: Any) -> None:
    """The Gauss-Newton matrix of a linear model is its Hessian: with its penalty as the damping, scores are those of
    leaving out, to first order."""
    rows, queries, decay = tiny.values(200), tiny.values(20, seed=5), 0.1
    x, y = torch.stack([x for x, _ in rows]).double(), torch.stack([y for _, y in rows]).double()
    weights = ridge(x, y, decay)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "optimum.pt"
    torch.save({"weight": weights[None].float()}, path)
    task = ValueTask(lambda: nn.Linear(5, 1, bias=False), rows)
    found = Checkpoint(path, 100, 0.1)
    index = build_index(task, [found], tmp_path / "index", basis=basis, precision="float16", progress=False)
    at = torch.stack([q for q, _ in queries]).double()
    left = at @ weights - torch.stack([v for _, v in queries]).double()
    gauss_newton = 2 * x.T @ x / len(x)
    scores = index.scores(queries, method="influence", damping=decay / float(gauss_newton.diag().mean()))
    hessian = gauss_newton + decay * torch.eye(5).double()
    exact = (2 * left[:, None] * at) @ torch.linalg.inv(hessian) @ (2 * (x @ weights - y)[:, None] * x).T
    agree(scores, exact.numpy())

    others = [[other for other in range(200) if other != row] for row in range(200)]
    without = torch.stack([at @ ridge(x[some], y[some], decay * 200 / 199) for some in others])  # [rows, queries]
    rise = (without - torch.stack([v for _, v in queries]).double()).square() - left.square()
    assert np.corrcoef(rise.T.flatten(), scores.ravel())[0, 1] > 0.99
    assert abs(float((200 * rise.T.flatten()).norm()) / np.linalg.norm(scores) - 1) < 0.1


def ridge(x: Tensor, y: Tensor, decay: float) -> Tensor:
    """Optimum of the mean squared error plus decay / 2 times the squared weights."""
    return torch.linalg.solve(2 * x.T @ x / len(x) + decay * torch.eye(x.shape[1]).double(), 2 * x.T @ y / len(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"damping": 0.0}, "damping must be a number above zero"),
        ({"damping": float("nan")}, "damping must be a number above zero"),
        ({"weights": "equal"}, "takes no weights.*checkpoints, damping"),
        ({"checkpoints": ["3.pt"]}, r"unknown checkpoint '3.pt'.*1\.pt, 2\.pt"),
    ],
)
def test_what_it_does_not_take(index: Index, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(QueryError, match=words):
        index.influence(QUERIES, method="influence", **arguments)


def test_it_needs_curvature(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="no curvature; build it with basis='gauss-newton' or 'spectral'"):
        tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path).scores(QUERIES, method="influence")
