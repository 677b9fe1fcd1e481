"""Influence functions without approximation, against leaving out and retraining, and against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, CurvatureError, ExactInfluence, LossError, TaskError
from gradtrace.exact.influence import conjugate_gradients
from gradtrace.task import Task

DECAY = 0.05  # of the convex models' penalty, (DECAY / 2) |weights|^2
ROWS, FEATURES = 500, 6

Losses = Callable[[Tensor, Tensor], Tensor]  # (outputs, values) -> losses


def separable(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs float32 [rows, FEATURES], and values that depend on them, with noise. [rows]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=generator)
    slope = torch.linspace(-1, 1, FEATURES)
    return inputs, inputs @ slope + 0.7 * torch.randn(rows, generator=generator)


def ridge(outputs: Tensor, values: Tensor) -> Tensor:
    return (outputs - values).square()


def logistic(outputs: Tensor, values: Tensor) -> Tensor:
    return F.softplus(-outputs * values.sign())


def fitted(losses: Losses, inputs: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """The minimum of sum(counts * losses) / ROWS + (DECAY / 2) |weights|^2, for each row of `counts` [m, ROWS], by
    Newton's method. float64 [m, FEATURES]."""
    weights = torch.zeros(len(counts), FEATURES, dtype=torch.float64)
    for _ in range(30):
        outputs = (weights @ inputs.T).requires_grad_()  # [m, ROWS]
        (slopes,) = torch.autograd.grad(losses(outputs, values).sum(), outputs, create_graph=True)
        (curvatures,) = torch.autograd.grad(slopes.sum(), outputs)
        gradient = (counts * slopes.detach()) @ inputs / ROWS + DECAY * weights
        if float(gradient.norm()) < 1e-12:
            return weights
        hessian = torch.einsum("mn,np,nq->mpq", counts * curvatures, inputs, inputs) / ROWS
        weights = weights - torch.linalg.solve(hessian + DECAY * torch.eye(FEATURES), gradient[:, :, None])[:, :, 0]
    raise AssertionError("no minimum found")


class Convex:
    """A convex model trained to its minimum, and what leaving out each row does to the queries' losses."""

    def __init__(self, losses: Losses, directory: Path) -> None:
        inputs, values = separable(0, ROWS)
        asked, wanted = separable(1, 20)
        self.queries = list(zip(asked, wanted, strict=True))
        self.task = tiny.PairTask(
            lambda: nn.Linear(FEATURES, 1, bias=False),
            list(zip(inputs, values, strict=True)),
            lambda model, batch: losses(model(batch[0]).flatten(), batch[1]),
        )
        inputs, values, asked, wanted = (x.double() for x in (inputs, values, asked, wanted[:, None]))
        weights = fitted(losses, inputs, values, torch.ones(1, ROWS))
        self.checkpoint = saved({"weight": weights}, directory)
        without = fitted(losses, inputs, values, 1 - torch.eye(ROWS))
        self.left_out = (losses(asked @ without.T, wanted) - losses(asked @ weights.T, wanted)).numpy()

    def reference(self, **arguments: Any) -> ExactInfluence:
        return ExactInfluence(self.task, self.checkpoint, **{"weight_decay": DECAY, **arguments})


def saved(state: dict[str, Tensor], directory: Path) -> Checkpoint:
    path = directory / "weights.pt"
    torch.save(state, path)
    return Checkpoint(path, 1, 0.1)


@pytest.fixture(scope="module", params=[ridge, logistic])
def convex(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Convex:
    return Convex(request.param, tmp_path_factory.mktemp("convex"))


def correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[float]:
    return [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(a, b, strict=True)]


def test_influence_is_what_leaving_a_row_out_does(convex: Convex) -> None:
    """Removal raises a query's loss by score / rows: proponents are positive."""
    scores = convex.reference().explicit(convex.queries)
    assert scores.dtype == np.float64
    assert min(correlations(scores, convex.left_out)) > 0.99
    slope = float((scores * convex.left_out).sum() / (scores**2).sum())
    assert slope * ROWS == pytest.approx(1, abs=0.1)


def test_conjugate_gradients_equal_the_explicit_inverse(convex: Convex) -> None:
    reference = convex.reference(damping=0.01)
    explicit = reference.explicit(convex.queries)
    np.testing.assert_allclose(reference.iterative(convex.queries, tolerance=1e-12), explicit, rtol=1e-6, atol=1e-9)


def test_the_sketch_is_unbiased_and_its_error_falls_with_its_size(convex: Convex) -> None:
    reference = convex.reference()
    explicit = reference.explicit(convex.queries)
    small, large = (
        np.stack([reference.sketched(convex.queries, size, seed) for seed in range(30)]) - explicit for size in (4, 64)
    )
    spread = np.sqrt((small**2).mean())
    assert np.sqrt((large**2).mean()) == pytest.approx(spread / 4, rel=0.2)  # one over the root of the size
    assert np.sqrt((small.mean(0) ** 2).mean()) < 1.5 * spread / 30**0.5


class Network:
    """A small network at weights that are no minimum, and its gradients and Hessian by plain autograd."""

    def __init__(self, directory: Path) -> None:
        self.rows, self.queries = tiny.classes(40), tiny.classes(3, seed=5)
        self.task: Task = tiny.ClassTask(tiny.mlp, self.rows)
        self.checkpoint = tiny.checkpoints(self.task, directory, 1)[0]
        self.model = tiny.loaded(self.task, self.checkpoint).double()
        self.parameters = torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def outputs(self, flat: Tensor, inputs: Tensor) -> Tensor:
        first, a, second, b = flat.split([20, 4, 12, 3])
        return torch.tanh(inputs @ first.view(4, 5).T + a) @ second.view(3, 4).T + b

    def batch(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in examples]).double(), torch.tensor([y for _, y in examples])

    def gradients(self, examples: Sequence[Any]) -> Tensor:
        inputs, labels = self.batch(examples)
        return torch.autograd.functional.jacobian(
            lambda flat: F.cross_entropy(self.outputs(flat, inputs), labels, reduction="none"), self.parameters
        )

    def hessian(self) -> Tensor:
        inputs, labels = self.batch(self.rows)
        return torch.autograd.functional.hessian(
            lambda flat: F.cross_entropy(self.outputs(flat, inputs), labels), self.parameters
        )

    def gauss_newton(self) -> Tensor:
        inputs, _ = self.batch(self.rows)
        slopes = torch.autograd.functional.jacobian(lambda flat: self.outputs(flat, inputs), self.parameters)
        chances = self.outputs(self.parameters, inputs).softmax(1)
        curvature = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        return torch.einsum("bip,bij,bjq->pq", slopes, curvature, slopes) / len(inputs)

    def scores(self, hessian: Tensor, kept: slice = slice(None)) -> NDArray[np.float64]:
        rows, queries = self.gradients(self.rows)[:, kept], self.gradients(self.queries)[:, kept]
        return (queries @ torch.linalg.inv(hessian[kept, kept]) @ rows.T).numpy()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return Network(tmp_path_factory.mktemp("network"))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [({}, slice(None)), ({"modules": ["2"]}, slice(24, 39)), ({"modules": ["0", "2"]}, slice(None))],
    ids=str,
)
@pytest.mark.parametrize("gauss_newton", [False, True])
def test_networks_and_single_layers(
    network: Network, arguments: dict[str, Any], kept: slice, gauss_newton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows and vectors in several batches."""
    monkeypatch.setattr("gradtrace.exact.influence._ROWS", 7)
    monkeypatch.setattr("gradtrace.exact.influence._VECTORS", 10)
    hessian = network.gauss_newton() if gauss_newton else network.hessian()
    expected = network.scores(hessian + 0.5 * torch.eye(39, dtype=torch.float64), kept)
    reference = ExactInfluence(
        network.task, network.checkpoint, gauss_newton=gauss_newton, damping=0.3, weight_decay=0.2, **arguments
    )
    for found in (reference.explicit(network.queries), reference.iterative(network.queries)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_the_measurement_takes_the_place_of_the_loss(network: Network) -> None:
    class Margins(tiny.ClassTask):
        def measurement(self, model: nn.Module, batch: Any) -> Tensor:
            return -3 * self.loss(model, batch)

    asked = ExactInfluence(Margins(tiny.mlp, network.rows), network.checkpoint, damping=0.5).explicit(network.queries)
    plain = ExactInfluence(network.task, network.checkpoint, damping=0.5).explicit(network.queries)
    np.testing.assert_allclose(asked, -3 * plain)


def test_what_cannot_be_inverted_is_told(network: Network) -> None:
    indefinite = ExactInfluence(network.task, network.checkpoint)
    for scores in (indefinite.explicit, indefinite.iterative):
        with pytest.raises(CurvatureError, match=r"not positive definite.*-\d.*gauss_newton=True"):
            scores(network.queries)
    positive = ExactInfluence(network.task, network.checkpoint, gauss_newton=True, damping=1e-3)
    with pytest.raises(CurvatureError, match=r"2 iterations .* leave a relative residual .* raise the damping"):
        positive.iterative(network.queries, iterations=2)


def test_a_hessian_that_is_too_large_is_not_formed(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradtrace.exact.influence._LARGEST", 38)
    with pytest.raises(CurvatureError, match=r"39 parameters .* iterative\(\)"):
        ExactInfluence(network.task, network.checkpoint).explicit(network.queries)


def test_what_the_model_does_not_have(network: Network) -> None:
    for modules in (["3"], ["0", "head"], ["1"], []):
        with pytest.raises(TaskError, match=r"no trainable parameter.*0, 2"):
            ExactInfluence(network.task, network.checkpoint, modules)


def test_a_reduced_loss_is_refused(network: Network) -> None:
    task = tiny.PairTask(tiny.mlp, network.rows, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(LossError, match="reduction"):
        ExactInfluence(task, network.checkpoint)


def test_sides_that_are_zero_or_solved_at_once() -> None:
    """Rows of different difficulty are solved together; zero gradients have the solution zero."""
    matrix = torch.diag(torch.tensor([1.0, 1.0, 50.0, 1e4], dtype=torch.float64))
    sides = torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    found = conjugate_gradients(lambda x: x @ matrix, sides, 1e-12, 20)
    torch.testing.assert_close(found @ matrix, sides)
