"""Histograms of all scores and probabilities of classes, beside NumPy and the model's own softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Index, InfluenceResult, QueryError, Task, open_index
from gradtrace_indexer import delete_rows
from tiny import ClassTask, PairTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path_factory.mktemp("answers"), basis="spectral", dimensions=12)


# Histograms


@pytest.mark.parametrize(
    "asked",
    [{}, {"method": "cosine"}, {"method": "repsim"}, {"aggregate": "mean"}, {"filter": {"labels": [2]}}],
    ids=str,
)
def test_histograms_are_of_all_scores(index: Index, asked: dict[str, Any]) -> None:
    scores = index.scores(QUERIES, method=asked.get("method", "tracin")).astype(np.float64)
    scores = scores.mean(0, keepdims=True) if "aggregate" in asked else scores
    for own, result in zip(scores, index.influence(QUERIES, include=["histogram"], **asked), strict=True):
        distribution = result.distribution
        assert distribution is not None
        assert distribution.histogram is not None
        edges = np.linspace(own.min(), own.max(), 61)
        np.testing.assert_allclose(distribution.histogram.edges, edges, rtol=1e-4, atol=1e-7)
        counted = np.histogram(own, edges)[0]
        # A score at an edge may be rounded to either side of it.
        assert np.abs(np.cumsum(counted) - np.cumsum(distribution.histogram.counts)).max() <= 1
        assert sum(distribution.histogram.counts) == 60
        np.testing.assert_allclose(distribution.mean, own.mean(), rtol=1e-3, atol=1e-7)
        assert result.proponents[0].percentile is None


def test_histograms_leave_out_deleted_rows_and_hold_equal_scores(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS[:1] * 20)
    tiny.build(task, tmp_path)
    delete_rows(tmp_path / "index", [3, 4])
    (result,) = open_index(tmp_path / "index", task).influence(QUERIES[:1], include=["histogram", "percentiles"])
    assert result.distribution is not None
    assert result.distribution.histogram is not None
    assert sorted(result.distribution.histogram.counts) == [*[0] * 59, 18]
    assert {hit.percentile for hit in [*result.proponents, *result.opponents]} == {0}


def test_what_is_not_asked_for_is_not_computed(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError

    for name in ("_place_among_all", "_add_probabilities"):
        monkeypatch.setattr(f"gradtrace.results.answering.Answering.{name}", refused)
    (result,) = index.influence(QUERIES[:1])
    assert (result.distribution, result.probabilities) == (None, None)


# Probabilities


def logits(task: Task, directory: Path, number: int = 2) -> NDArray[np.float64]:
    """Of the queries, at a checkpoint. [queries, outputs]"""
    model = tiny.loaded(task, tiny.checkpoints(task, directory / "checkpoints")[number - 1]).double()
    with torch.no_grad():
        outputs: NDArray[np.float64] = model(torch.stack([x for x, _ in QUERIES]).double()).numpy()
    return outputs


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials: NDArray[np.float64] = np.exp(values - values.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def check(result: InfluenceResult, expected: NDArray[np.float64]) -> None:
    """expected: [classes]"""
    assert result.probabilities is not None
    assert [p.label for p in result.probabilities] == np.argsort(-expected, kind="stable").tolist()
    np.testing.assert_allclose([p.probability for p in result.probabilities], -np.sort(-expected), rtol=1e-4)


class PlainTask(ClassTask):
    """The loss calls no loss function, so that probabilities come from predict."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        values = model(batch[0])
        return values.exp().sum(1).log() - values.gather(1, batch[1][:, None])[:, 0]


class CertainTask(PlainTask):
    """predict returns probabilities."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).softmax(1)


@pytest.mark.parametrize("kind", [PairTask, ClassTask, PlainTask, CertainTask])
def test_probabilities_are_the_softmax_of_the_outputs(tmp_path: Path, kind: type[PairTask]) -> None:
    task = kind(tiny.mlp, ROWS)
    index, expected = tiny.build(task, tmp_path), softmax(logits(task, tmp_path))
    asked: dict[str, Any] = {"include": ["probabilities"], "k": 1}
    for own, result in zip(expected, index.influence(QUERIES, **asked), strict=True):
        check(result, own)
        assert result.probabilities is not None
        assert result.prediction in (result.probabilities[0].label, None)
    (mean,) = index.influence(QUERIES, aggregate="mean", **asked)
    check(mean, expected.mean(0))
    unlabelled = QUERIES if kind is PairTask else [(x, None) for x, _ in QUERIES]
    for own, result in zip(expected, index.influence(unlabelled, target={"label": 1}, **asked), strict=True):
        check(result, own)


def test_probabilities_are_those_of_the_last_checkpoint_used(index: Index, tmp_path: Path) -> None:
    expected = softmax(logits(index.task, tmp_path, 1))
    for own, result in zip(
        expected, index.influence(QUERIES, checkpoints=["1.pt"], include=["probabilities"]), strict=True
    ):
        check(result, own)


def test_probabilities_of_two_classes_with_one_output(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]).flatten(), batch[1], reduction="none")

    task = PairTask(tiny.value_mlp, [(x, torch.tensor(float(y))) for x, y in tiny.classes(30, labels=2)], loss)
    index = tiny.build(task, tmp_path)
    ones = 1 / (1 + np.exp(-logits(task, tmp_path)[:, 0]))
    queries = [(x, None) for x, _ in QUERIES]
    for one, result in zip(ones, index.influence(queries, include=["probabilities"]), strict=True):
        check(result, np.array([1 - one, one]))


def test_at_most_twenty_classes(tmp_path: Path) -> None:
    task = ClassTask(lambda: nn.Linear(5, 30), tiny.classes(60, labels=30))
    index, expected = tiny.build(task, tmp_path), softmax(logits(task, tmp_path))
    for own, result in zip(expected, index.influence(QUERIES, include=["probabilities"]), strict=True):
        assert result.probabilities is not None
        assert [p.label for p in result.probabilities] == np.argsort(-own, kind="stable")[:20].tolist()


def test_values_have_no_probabilities(tmp_path: Path) -> None:
    rows = tiny.values(30)
    index = tiny.build(tiny.ValueTask(tiny.value_mlp, rows), tmp_path)
    assert index.influence(rows[:2], include=["probabilities"])[0].probabilities is None


# Clusters


def near(rows: NDArray[np.float64], hits: list[int]) -> list[int]:
    """By hand: for each hit the first hit above it that leads a cluster and has almost its direction. rows: [all, D]"""
    leaders: list[int] = []
    of: list[int] = []
    for hit in hits:
        norms = [np.linalg.norm(rows[hit]) * np.linalg.norm(rows[leader]) for leader in leaders]
        close = [leader for leader, norm in zip(leaders, norms, strict=True) if rows[hit] @ rows[leader] / norm >= 0.97]
        of.append(close[0] if close else hit)
        if not close:
            leaders.append(hit)
    return of


def copies(directory: Path) -> tuple[Index, NDArray[np.float64]]:
    """Every row has two almost like it, by another amount of noise each; and the vectors of all [rows, D]."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        (x + noise * torch.randn(5, generator=generator), y) for noise in (0, 0.01, 0.2) for x, y in tiny.classes(25)
    ]
    index = tiny.build(ClassTask(tiny.mlp, rows), directory, precision="int8")
    return index, tiny.stored(index).flatten(1).double().numpy()


@pytest.mark.parametrize(
    "asked", [{}, {"checkpoints": ["2.pt"]}, {"rescore": True}, {"filter": {"labels": [1]}}], ids=str
)
def test_clusters_are_near_in_direction_and_led_by_the_strongest(tmp_path: Path, asked: dict[str, Any]) -> None:
    index, rows = copies(tmp_path)
    if "checkpoints" in asked:
        rows = rows[:, rows.shape[1] // 2 :]
    together = 0
    for result in index.influence(QUERIES, k=25, include=["clusters"], **asked):
        for hits in (result.proponents, result.opponents):
            found = [hit.cluster for hit in hits]
            assert found == near(rows, [hit.row for hit in hits])
            together += len(hits) - len(set(found))
    assert together > 10


def test_clusters_of_representations_and_of_rows_that_are_left(tmp_path: Path) -> None:
    index, _ = copies(tmp_path)
    delete_rows(tmp_path / "index", [0, 1, 30])
    index = open_index(tmp_path / "index", index.task)
    for method in ("repsim", "tracin"):
        for result in index.influence(QUERIES[:2], k=25, method=method, include=["clusters"]):
            rows = [hit.row for hit in result.proponents]
            assert {hit.cluster for hit in result.proponents} < set(rows)
            assert not {0, 1, 30} & set(rows)
            assert result.proponents[0].cluster == rows[0]
    store = index.contents.representations
    assert store is not None
    vectors = np.zeros((75, store.dimensions))
    vectors[store.row_ids.ids] = store.gather([0], range(store.rows))[:, 0].double().numpy()
    (result,) = index.influence(QUERIES[:1], k=25, method="repsim", include=["clusters"])
    for hits in (result.proponents, result.opponents):
        assert [hit.cluster for hit in hits] == near(vectors, [hit.row for hit in hits])


def test_rows_without_a_direction_are_alone(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten() * batch[1]

    sizes = [0.0, 0.0, 1.0, 2.0]
    task = PairTask(lambda: nn.Linear(5, 1, bias=False), [(torch.ones(5), torch.tensor(s)) for s in sizes], loss)
    (result,) = tiny.build(task, tmp_path, count=1).influence(
        task.train[2:3], k=4, method="repsim", include=["clusters"]
    )
    assert [hit.cluster for hit in result.proponents] == [0, 0, 0, 0]  # the same inputs
    (result,) = open_index(tmp_path / "index", task).influence(task.train[2:3], k=4, include=["clusters"])
    assert [(hit.row, hit.cluster) for hit in result.proponents] == [(3, 3), (2, 3)]


def test_clusters_are_of_few_hits(index: Index) -> None:
    with pytest.raises(QueryError, match="clusters are of 1,000 hits"):
        index.influence(QUERIES, k=1001, include=["clusters"])
    assert all(hit.cluster is None for hit in index.influence(QUERIES[:1])[0].proponents)
