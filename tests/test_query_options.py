"""Rescoring, means of several queries, shares by layer and percentiles, each against sums over exact gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from conftest import mostly_long
from gradtrace import Hit, Index, InfluenceResult, QueryError, RowFilter, gradients_reference, open_index
from gradtrace.results.rescoring import CANDIDATES
from gradtrace_indexer import compact, delete_rows
from tiny import ClassTask, PairTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
RATES = {"1.pt": 0.1, "2.pt": 0.05, "3.pt": 0.1 / 3}
FEW = 6  # dimensions: far too few for right scores
METHODS = [
    {},
    {"weights": "equal"},
    {"weights": "learning_rate_steps"},
    {"checkpoints": ["3.pt", "1.pt"]},
    {"method": "graddot"},
    {"method": "graddot", "checkpoints": ["1.pt", "2.pt"], "weights": "learning_rate"},
    {"method": "cosine"},
    {"method": "cosine", "checkpoints": list(RATES)},
]


@dataclass
class Exact:
    """An index of few dimensions, and exact gradients by checkpoint and parameter name."""

    index: Index
    rows: dict[str, dict[str, Tensor]]
    queries: dict[str, dict[str, Tensor]]

    def parts(self, names: Sequence[str], layer: str = "") -> dict[str, Tensor]:
        """Inner products by checkpoint, of the parameters whose names start with `layer`. Each [queries, rows]."""
        found = {}
        for name in names:
            keys = [key for key in self.rows[name] if key.startswith(layer)]
            found[name] = tiny.flat(self.queries[name], keys) @ tiny.flat(self.rows[name], keys).T
        return found

    def scores(self, asked: dict[str, Any], layer: str = "") -> dict[str, Tensor]:
        """Parts by checkpoint of the scores that the question asks for. Each [queries, rows]."""
        method = asked.get("method", "tracin")
        names = sorted(asked.get("checkpoints") or (RATES if method == "tracin" else ["3.pt"]))
        weights = asked.get("weights", "learning_rate" if method == "tracin" else "equal")
        steps = {"1.pt": 10, "2.pt": 20, "3.pt": 30}
        factors = {
            "equal": lambda n: 1.0,
            "learning_rate": RATES.get,
            "learning_rate_steps": lambda n: RATES[n] * steps[n],
        }
        parts = {name: factors[weights](name) * part for name, part in self.parts(names, layer).items()}
        if method != "cosine":
            return parts
        q, r = (torch.cat([tiny.flat(side[n]) for n in names], 1).norm(dim=1) for side in (self.queries, self.rows))
        return {name: part / (q[:, None] * r) for name, part in parts.items()}


class MarginTask(ClassTask):
    """Explains how far the label's logit is above the mean of all."""

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return logits.mean(1) - logits.gather(1, batch[1][:, None])[:, 0]


def made(task: PairTask, directory: Path, **arguments: Any) -> Exact:
    index = tiny.build(task, directory, count=3, **{"basis": "spectral", "dimensions": FEW, **arguments})
    rows, queries = {}, {}
    for checkpoint in tiny.checkpoints(task, directory / "checkpoints", 3):
        model = tiny.loaded(task, checkpoint)
        rows[checkpoint.name] = gradients_reference(task, model, task.train)
        queries[checkpoint.name] = gradients_reference(task, model, QUERIES, task.measurement)
    return Exact(index, rows, queries)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return made(ClassTask(tiny.mlp, ROWS), tmp_path_factory.mktemp("rescored"))


def both(result: InfluenceResult) -> list[Hit]:
    return [*result.proponents, *result.opponents]


def close(found: Any, expected: Any, scale: float) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def check_hits(result: InfluenceResult, parts: dict[str, Tensor], query: int | None = None) -> None:
    """Scores and parts by checkpoint are the exact ones of this query, or of the mean of all."""
    scale = float(sum(part.abs().max() for part in parts.values()))
    for hit in both(result):
        assert set(hit.parts) == set(parts)
        for name, part in parts.items():
            close(hit.parts[name], float(part[:, hit.row].mean() if query is None else part[query, hit.row]), scale)
        close(hit.score, sum(hit.parts.values()), scale)
    assert [h.score for h in result.proponents] == sorted((h.score for h in result.proponents), reverse=True)
    assert [h.score for h in result.opponents] == sorted(h.score for h in result.opponents)


# Rescoring


@pytest.mark.parametrize("asked", METHODS, ids=str)
def test_rescored_scores_are_exact(exact: Exact, asked: dict[str, Any]) -> None:
    for number, result in enumerate(exact.index.influence(QUERIES, k=4, rescore=True, **asked)):
        check_hits(result, exact.scores(asked), number)
        assert result.rescored


@pytest.mark.parametrize("asked", METHODS, ids=str)
def test_where_all_rows_are_candidates_the_ends_are_the_exact_ones(exact: Exact, asked: dict[str, Any]) -> None:
    scores = sum(exact.scores(asked).values())
    assert isinstance(scores, Tensor)
    for row, result in zip(scores, exact.index.influence(QUERIES, k=30, rescore=True, **asked), strict=True):
        assert result.rows_rescored == 60
        best, worst = tiny.ends(row.numpy(), 30)
        assert [hit.row for hit in result.proponents] == best
        assert [hit.row for hit in result.opponents] == worst


def test_candidates_come_from_both_ends_of_the_compressed_search(exact: Exact) -> None:
    scores = sum(exact.scores({}).values())
    assert isinstance(scores, Tensor)
    searched = exact.index.influence(QUERIES, k=4 * CANDIDATES)
    for row, wide, result in zip(scores, searched, exact.index.influence(QUERIES, k=4, rescore=True), strict=True):
        rows = {hit.row for hit in both(wide)}
        assert result.rows_rescored == len(rows)
        order = sorted(rows, key=lambda r: float(row[r]))
        assert [hit.row for hit in result.opponents] == [r for r in order[:4] if row[r] < 0]
        assert [hit.row for hit in result.proponents] == [r for r in order[:-5:-1] if row[r] > 0]


def test_rescoring_keeps_to_the_filter_and_to_alone_or_together(exact: Exact) -> None:
    row_filter = RowFilter(labels=[1])
    many = exact.index.influence([*QUERIES, *ROWS], k=3, rescore=True, filter=row_filter)
    for number, query in enumerate(QUERIES):
        alone = exact.index.influence([query], k=3, rescore=True, filter=row_filter)[0]
        assert [hit.row for hit in both(alone)] == [hit.row for hit in both(many[number])]
        assert {hit.label for hit in both(alone)} == {1}
        np.testing.assert_allclose(
            [h.score for h in both(alone)], [h.score for h in both(many[number])], rtol=1e-4, atol=1e-7
        )


def test_a_measurement_and_a_missing_label_are_rescored_as_they_are_searched(tmp_path: Path) -> None:
    exact = made(MarginTask(tiny.mlp, ROWS), tmp_path)
    by_measurement = exact.index.influence(QUERIES, k=4, rescore=True)
    for number, result in enumerate(by_measurement):
        check_hits(result, exact.scores({}), number)
        assert result.target == "measurement"
    by_loss = exact.index.influence(QUERIES, k=4, rescore=True, target="loss")
    assert [h.score for h in both(by_loss[0])] != [h.score for h in both(by_measurement[0])]
    silent = exact.index.influence([(x, None) for x, _ in QUERIES], k=4, rescore=True)
    said = exact.index.influence(
        [(x, r.prediction) for (x, _), r in zip(QUERIES, silent, strict=True)], k=4, rescore=True
    )
    for a, b in zip(silent, said, strict=True):
        assert [(h.row, h.score) for h in both(a)] == [(h.row, h.score) for h in both(b)]


def test_values_and_mixed_measures_are_rescored(tmp_path: Path) -> None:
    task = tiny.ValueTask(tiny.value_mlp, tiny.values(30))
    index = tiny.build(task, tmp_path, basis="none")
    queries = [(x, y if number % 2 else None) for number, (x, y) in enumerate(tiny.values(6, seed=3))]
    plain, again = index.influence(queries, k=5), index.influence(queries, k=5, rescore=True)
    for a, b in zip(plain, again, strict=True):
        assert [h.row for h in both(a)] == [h.row for h in both(b)]
        np.testing.assert_allclose([h.score for h in both(a)], [h.score for h in both(b)], rtol=5e-3, atol=1e-5)


def test_a_zero_gradient_has_no_cosine_but_zero(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten() * batch[1]

    sizes = [0.0, 1e-20, 1.0, -1e4]
    task = PairTask(lambda: nn.Linear(5, 1, bias=False), [(torch.ones(5), torch.tensor(s)) for s in sizes], loss)
    index = tiny.build(task, tmp_path, count=1)
    query = (torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor(1.0))
    one, zero = index.influence([query, (query[0] * 0, query[1])], method="cosine", k=4, rescore=True)
    found = {hit.row: hit.score for hit in both(one)}
    np.testing.assert_allclose([found[row] for row in (1, 2, 3)], np.array([1, 1, -1]) / 5**0.5, rtol=1e-5)
    assert [{hit.row for hit in end} for end in (one.proponents, one.opponents)] == [{1, 2}, {3}]
    assert (both(zero), zero.note) == (
        [],
        "the gradient of this query is zero at every checkpoint used (its loss is 0: the model is certain, saturated), "
        "so every score is zero",
    )


def test_the_cost_of_rescoring_is_told(exact: Exact) -> None:
    assert exact.index.influence(QUERIES, rescore=True).timing["rescore"] > 0
    results = exact.index.influence(QUERIES)
    assert results.timing["rescore"] == 0
    result = results[0]
    assert (result.rescored, result.rows_rescored) == (False, 0)


# Means of several queries


@pytest.mark.parametrize("asked", METHODS, ids=str)
def test_mean_of_queries(exact: Exact, asked: dict[str, Any]) -> None:
    mean = exact.index.scores(QUERIES, **asked).mean(0)
    (result,) = exact.index.influence(QUERIES, k=8, aggregate="mean", **asked)
    assert result.queries == len(QUERIES)
    for hits, order in ((result.proponents, np.argsort(-mean)), (result.opponents, np.argsort(mean))):
        assert [hit.row for hit in hits] == order[:8].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], mean[order[:8]], rtol=1e-3, atol=1e-6)
    (again,) = exact.index.influence(QUERIES, k=8, aggregate="mean", rescore=True, **asked)
    check_hits(again, exact.scores(asked))


def test_a_mean_says_what_its_queries_share(exact: Exact) -> None:
    several = exact.index.influence(QUERIES)
    (mean,) = exact.index.influence([*QUERIES, (QUERIES[0][0], None)], aggregate="mean")
    assert (mean.label, mean.target, mean.queries) == (None, "loss and loss at the predicted label", 8)
    (same,) = exact.index.influence([QUERIES[0]] * 3, aggregate="mean")
    assert (same.label, same.prediction, same.queries) == (several[0].label, several[0].prediction, 3)
    assert math.isclose(same.loss, several[0].loss, rel_tol=1e-6)
    assert [hit.row for hit in both(same)] == [hit.row for hit in both(several[0])]


# Shares by layer


@pytest.mark.parametrize(
    "basis", mostly_long(["gauss-newton", "spectral", "two-sided", "none"], "gauss-newton", "none")
)
@pytest.mark.parametrize("asked", [{}, {"method": "cosine"}, {"aggregate": "mean"}], ids=str)
def test_layers_sum_to_the_score(tmp_path: Path, basis: str, asked: dict[str, Any]) -> None:
    index = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, basis=basis, dimensions=12)
    for result in index.influence(QUERIES, k=5, include=["layers"], **asked):
        for hit in both(result):
            assert hit.layers is not None
            assert set(hit.layers) == {"0", "2"}
            assert math.isclose(sum(hit.layers.values()), hit.score, rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.parametrize("rescore", [False, True])
@pytest.mark.parametrize("asked", [{}, {"method": "cosine", "checkpoints": ["1.pt", "3.pt"]}], ids=str)
def test_layers_are_the_products_of_their_parameters(tmp_path: Path, asked: dict[str, Any], rescore: bool) -> None:
    exact = made(ClassTask(tiny.mlp, ROWS), tmp_path, basis="none")
    for number, result in enumerate(exact.index.influence(QUERIES, k=5, include=["layers"], rescore=rescore, **asked)):
        for name in ("0", "2"):
            expected = sum(exact.scores(asked, f"{name}.").values())
            assert isinstance(expected, Tensor)
            for hit in both(result):
                assert hit.layers is not None
                error = abs(hit.layers[name] - float(expected[number, hit.row]))
                assert error < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("basis", ["gaussian", "rademacher"])
def test_dense_projections_have_no_layers_but_rescored(tmp_path: Path, basis: str) -> None:
    index = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, basis=basis, dimensions=8)
    with pytest.raises(QueryError, match=r"mix all layers.*rescore"):
        index.influence(QUERIES, include=["layers"])
    assert set(both(index.influence(QUERIES, include=["layers"], rescore=True)[0])[0].layers or ()) == {"0", "2"}


def test_nothing_is_included_unasked(exact: Exact) -> None:
    for rescore in (False, True):
        result = exact.index.influence(QUERIES[:1], rescore=rescore)[0]
        assert all(hit.layers is None and hit.percentile is None for hit in both(result))
        assert result.distribution is None


# Percentiles


@pytest.mark.parametrize(
    "asked", [{}, {"method": "cosine"}, {"aggregate": "mean"}, {"filter": RowFilter(labels=[2])}], ids=str
)
def test_percentiles_are_those_among_all_rows(exact: Exact, asked: dict[str, Any]) -> None:
    scores: NDArray[np.float32] = exact.index.scores(QUERIES, method=asked.get("method", "tracin"))
    scores = scores.mean(0, keepdims=True) if "aggregate" in asked else scores
    for own, result in zip(scores, exact.index.influence(QUERIES, k=60, include=["percentiles"], **asked), strict=True):
        for hit in both(result):
            assert hit.percentile is not None
            assert math.isclose(hit.percentile, 100 * float((own < own[hit.row]).mean()), abs_tol=1e-9)
        assert result.distribution is not None
        np.testing.assert_allclose(result.distribution.mean, own.mean(), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(result.distribution.std, own.std(), rtol=1e-4)
        for share, value in result.distribution.quantiles.items():
            np.testing.assert_allclose(value, np.quantile(own, int(share) / 100), rtol=1e-4, atol=1e-7)


def test_rescored_hits_are_placed_by_their_exact_scores(exact: Exact) -> None:
    scores = sum(exact.scores({}).values())
    assert isinstance(scores, Tensor)
    for own, result in zip(
        scores, exact.index.influence(QUERIES, k=60, rescore=True, include=["percentiles"]), strict=True
    ):
        for hit in result.proponents:  # all rows were rescored
            assert hit.percentile is not None
            assert math.isclose(hit.percentile, 100 * float((own < own[hit.row]).double().mean()), abs_tol=1e-9)


def test_equal_rows_have_equal_percentiles(tmp_path: Path) -> None:
    index = tiny.build(ClassTask(tiny.mlp, ROWS[:5] * 4), tmp_path)
    result = index.influence(QUERIES[:1], k=20, include=["percentiles"])[0]
    assert sorted({hit.percentile for hit in both(result)}) == [0, 20, 40, 60, 80]


# Deleted rows


@pytest.mark.parametrize("compacted", [False, True])
def test_deleted_rows_are_neither_found_nor_counted(tmp_path: Path, compacted: bool) -> None:
    task, gone = ClassTask(tiny.mlp, ROWS), [0, 3, 30, 31]
    exact = made(task, tmp_path, basis="none")
    delete_rows(tmp_path / "index", gone)
    if compacted:
        compact(tmp_path / "index", progress=False)
    index = open_index(tmp_path / "index", task)
    asked: dict[str, Any] = {"k": 60, "include": ["layers", "percentiles"]}
    left = [row for row in range(60) if row not in gone]
    scores = sum(exact.scores({}).values())
    assert isinstance(scores, Tensor)
    for rescore in (False, True):
        for number, result in enumerate(index.influence(QUERIES, rescore=rescore, **asked)):
            own = scores[number]
            assert sorted(hit.row for hit in both(result)) == left
            for place, hit in enumerate(result.opponents):
                assert abs(hit.score - float(own[hit.row])) < 2e-3 * float(own.abs().max())
                assert abs(sum((hit.layers or {}).values()) - hit.score) < 1e-5
                assert hit.label == ROWS[hit.row][1]
                assert hit.percentile is not None
                assert abs(hit.percentile - 100 * place / len(left)) <= 100 / len(left)


# Refused


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"aggregate": "sum"}, "unknown aggregate 'sum'.*\"mean\""),
        ({"include": ["parts"]}, r"unknown include \['parts'\]; choose from layers, percentiles"),
        ({"k": 0, "rescore": True}, "k must be at least 1"),
    ],
)
def test_options_that_are_refused(exact: Exact, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(QueryError, match=words):
        exact.index.influence(QUERIES, **asked)
