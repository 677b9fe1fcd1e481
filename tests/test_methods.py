"""Scores of every method against sums over exact gradients in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Index, QueryError, gradients_reference
from tiny import ClassTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
NAMES = ("1.pt", "2.pt", "3.pt")
STEPS, RATES = (10, 30, 60), (0.1, 0.05, 0.1 / 3)  # as tiny.checkpoints has them


class Exact:
    """Exact gradients of rows and queries at each checkpoint, and the index that is held against them."""

    def __init__(self, directory: Path, rows: Sequence[Any], basis: str = "none") -> None:
        self.task = ClassTask(tiny.mlp, rows)
        self.index: Index = tiny.build(self.task, directory, count=3, basis=basis, dimensions=1000)
        models = [tiny.loaded(self.task, c) for c in tiny.checkpoints(self.task, directory / "checkpoints", 3)]
        self.rows = [tiny.flat(gradients_reference(self.task, model, rows)) for model in models]
        self.queries = [tiny.flat(gradients_reference(self.task, model, QUERIES)) for model in models]

    def products(self, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Weighted sum over checkpoints of the inner products, and of the norms' products. Each [queries, rows]."""
        sums = [
            (w * q @ r.T, w * q.norm(dim=1)[:, None] * r.norm(dim=1))
            for w, q, r in zip(weights, self.queries, self.rows, strict=True)
        ]
        return sum(s[0] for s in sums), sum(s[1] for s in sums)  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["none", "spectral", "gauss-newton"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """All keep all coordinates, so all have exact inner products."""
    rows = [*ROWS, (torch.zeros(5), 0)]
    return Exact(tmp_path_factory.mktemp("exact"), rows, request.param)


def agrees(found: NDArray[np.float32], expected: Tensor, size: Tensor) -> None:
    """Within the rounding of float16 rows; `size` bounds the sums of absolute values."""
    assert found.dtype == np.float32
    assert (np.abs(found - expected.numpy()) <= 1e-3 * size.numpy() + 1e-12).all()


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({}, RATES),
        ({"method": "tracin", "weights": "learning_rate"}, RATES),
        ({"weights": "equal"}, (1, 1, 1)),
        ({"weights": "learning_rate_steps"}, (0.1 * 10, 0.05 * 20, 0.1 / 3 * 30)),
        ({"checkpoints": ["2.pt"]}, (0, 0.05, 0)),
        ({"checkpoints": ["3.pt", "1.pt"]}, (0.1, 0, 0.1 / 3)),
        ({"checkpoints": ["3.pt"], "weights": "learning_rate_steps"}, (0, 0, 0.1 / 3 * 30)),
        ({"method": "graddot"}, (0, 0, 1)),
        ({"method": "graddot", "checkpoints": list(NAMES)}, (1, 1, 1)),
        ({"method": "graddot", "weights": "learning_rate"}, (0, 0, 0.1 / 3)),
    ],
    ids=str,
)
def test_inner_products(exact: Exact, arguments: dict[str, Any], weights: Sequence[float]) -> None:
    scores = exact.index.scores(QUERIES, **arguments)
    agrees(scores, *exact.products(weights))
    squares = sum(w * r.square().sum(1) for w, r in zip(weights, exact.rows, strict=True))
    np.testing.assert_allclose(exact.index.self_influence(**arguments), squares, rtol=1e-3)


@pytest.mark.parametrize("checkpoints", [["3.pt"], ["1.pt", "3.pt"], list(NAMES)])
def test_cosines(exact: Exact, checkpoints: list[str]) -> None:
    """Of the gradients at all chosen checkpoints together; a zero gradient has no direction, so no cosine but 0."""
    chosen = [NAMES.index(name) for name in checkpoints]
    q, r = (torch.cat([side[c] for c in chosen], dim=1) for side in (exact.queries, exact.rows))
    expected = torch.nn.functional.cosine_similarity(q[:, None], r[None], dim=2)
    scores = exact.index.scores(QUERIES, method="cosine", checkpoints=checkpoints)
    agrees(scores, expected, torch.ones(()))
    assert np.abs(scores).max() <= 1 + 1e-5
    np.testing.assert_array_equal(exact.index.self_influence(method="cosine", checkpoints=checkpoints), np.ones(61))
    found = exact.index.influence([ROWS[4]], method="cosine", checkpoints=checkpoints, k=1)[0].proponents[0]
    assert (found.row, round(found.score, 3)) == (4, 1)


def test_cosine_of_zero_and_of_tiny_gradients(tmp_path: Path) -> None:
    """Norms may be 24 orders of magnitude apart; those of 40, like those of zero rows, have no direction left."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten() * batch[1]

    sizes = [0.0, 1e-36, 1e-20, 1.0, 1e4, -1e4]
    rows = [(torch.ones(5), torch.tensor(size)) for size in sizes]
    task = tiny.PairTask(lambda: nn.Linear(5, 1, bias=False), rows, loss)
    index = tiny.build(task, tmp_path, count=1)
    query = (torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor(1.0))
    expected = np.array([0, 0, 1, 1, 1, -1]) / 5**0.5
    np.testing.assert_allclose(index.scores([query], method="cosine")[0], expected, rtol=1e-2, atol=1e-6)
    np.testing.assert_array_equal(index.self_influence(method="cosine"), [0, 0, 1, 1, 1, 1])
    result = index.influence([query, (query[0] * 0, query[1])], method="cosine", k=6)
    hits = [*result[0].proponents, *result[0].opponents]
    assert {hit.row: round(hit.score, 2) for hit in hits} == {
        row: score for row, score in enumerate(np.round(expected, 2).tolist()) if score
    }
    assert result[1].proponents == result[1].opponents == []


@pytest.mark.parametrize("method", ["tracin", "graddot", "cosine"])
def test_both_ends_are_those_of_all_scores(exact: Exact, method: str) -> None:
    scores = exact.index.scores(QUERIES, method=method)
    for row, result in zip(scores, exact.index.influence(QUERIES, method=method, k=5), strict=True):
        assert result.exact
        assert result.rows_searched == 61
        for hits, order in ((result.proponents, np.argsort(-row)), (result.opponents, np.argsort(row))):
            found = np.array([hit.score for hit in hits])
            np.testing.assert_allclose(found, row[order[:5]], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(row[[hit.row for hit in hits]], found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "tracing"}, "unknown method 'tracing'.*tracin, graddot, cosine"),
        ({"checkpoints": ["4.pt"]}, r"unknown checkpoint '4.pt'.*1\.pt, 2\.pt, 3\.pt"),
        ({"checkpoints": []}, "checkpoints must be named"),
        ({"checkpoints": ["1.pt", "1.pt"]}, "each once"),
        ({"weights": "rate"}, "unknown weights 'rate'.*learning_rate_steps"),
        ({"method": "cosine", "weights": "learning_rate"}, "leave weights out"),
    ],
)
def test_what_an_index_does_not_have(exact: Exact, arguments: dict[str, Any], words: str) -> None:
    index = exact.index
    for ask in (index.influence, index.scores):
        with pytest.raises(QueryError, match=words):
            ask(QUERIES, **arguments)
    with pytest.raises(QueryError, match=words):
        index.self_influence(**arguments)
