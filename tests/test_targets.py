"""Queries about the loss at another label, and about the difference of two, beside autograd in float64."""

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
from gradtrace import Index, QueryError, Task, open_index
from gradtrace_indexer.derived import add_kernels, fit_representer
from tiny import ClassTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
NAMES = ("cat", "dog", "bird")
RATES = (0.1, 0.05)
CONTRAST = {"label": 2, "rather_than": 0}


class NamedTask(ClassTask):
    class_names = NAMES


class MarginTask(NamedTask):
    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return logits.mean(1) - logits.gather(1, batch[1][:, None])[:, 0]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """All coordinates are kept."""
    return tiny.build(NamedTask(tiny.mlp, ROWS), tmp_path_factory.mktemp("targets"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A basis of few dimensions, with everything that methods need."""
    directory = tmp_path_factory.mktemp("compressed")
    task = NamedTask(tiny.mlp, ROWS)
    tiny.build(task, directory, basis="gauss-newton", dimensions=12)
    add_kernels(directory / "index", progress=False)
    fit_representer(directory / "index")
    return open_index(directory / "index", task)


def gradient(model: nn.Module, x: Tensor, label: int, rather_than: int | None = None) -> NDArray[np.float64]:
    """Of the loss at a label, minus that at another. float64 [parameters]"""
    exact = model.double()
    log_p = exact(x.double()[None]).log_softmax(1)[0]
    value = -log_p[label] + (0 if rather_than is None else log_p[rather_than])
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(exact.parameters()))]).numpy()


def gradients(task: Task, directory: Path, asked: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """By checkpoint, of the queries at the labels asked for and of the rows at their own. Each [n, parameters]."""
    models = [tiny.loaded(task, checkpoint) for checkpoint in tiny.checkpoints(task, directory)]
    queries = [
        np.stack([gradient(model, x, asked["label"], asked.get("rather_than")) for x, _ in QUERIES]) for model in models
    ]
    return queries, [np.stack([gradient(model, x, y) for x, y in ROWS]) for model in models]


@pytest.mark.parametrize("asked", [{"label": 1}, CONTRAST], ids=str)
def test_scores_are_products_with_the_gradient_at_the_label(
    index: Index, tmp_path: Path, asked: dict[str, Any]
) -> None:
    queries, rows = gradients(index.task, tmp_path, asked)
    expected = sum(rate * q @ r.T for rate, q, r in zip(RATES, queries, rows, strict=True))
    unrounded = index.pairs(ROWS, QUERIES, target=asked)
    np.testing.assert_allclose(unrounded, expected, rtol=1e-3, atol=1e-6)
    tolerance = 2e-3 * np.abs(expected).max()
    np.testing.assert_allclose(index.scores(QUERIES, target=asked), expected, atol=tolerance)
    for number, result in enumerate(index.influence(QUERIES, k=4, target=asked)):
        best, worst = tiny.ends(index.scores(QUERIES, target=asked)[number], 4)
        assert ([hit.row for hit in result.proponents], [hit.row for hit in result.opponents]) == (best, worst)
        for hit in [*result.proponents, *result.opponents]:
            assert abs(hit.score - expected[number, hit.row]) < tolerance


@pytest.mark.parametrize("asked", [{"label": 1}, CONTRAST], ids=str)
def test_the_cosine_of_a_contrast_is_that_of_the_difference(
    index: Index, compressed: Index, tmp_path: Path, asked: dict[str, Any]
) -> None:
    queries, rows = gradients(index.task, tmp_path, asked)
    q, r = queries[-1], rows[-1]
    expected = (q @ r.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(index.scores(QUERIES, method="cosine", target=asked), expected, atol=2e-3)
    for number, result in enumerate(compressed.influence(QUERIES, k=30, method="cosine", target=asked, rescore=True)):
        assert result.rows_rescored == 60
        for hit in [*result.proponents, *result.opponents]:
            assert abs(hit.score - expected[number, hit.row]) < 1e-5


def test_a_contrast_is_rescored_by_full_gradients(compressed: Index, tmp_path: Path) -> None:
    queries, rows = gradients(compressed.task, tmp_path, CONTRAST)
    expected = sum(rate * q @ r.T for rate, q, r in zip(RATES, queries, rows, strict=True))
    asked: dict[str, Any] = {"k": 30, "target": CONTRAST, "rescore": True, "include": ["layers"]}
    for number, result in enumerate(compressed.influence(QUERIES, **asked)):
        best, worst = tiny.ends(expected[number], 30)
        assert ([hit.row for hit in result.proponents], [hit.row for hit in result.opponents]) == (best, worst)
        for hit in result.proponents:
            assert abs(sum((hit.layers or {}).values()) - hit.score) < 1e-5


@pytest.mark.parametrize("method", ["tracin", "graddot", "influence", "source", "trak", "representer"])
def test_a_contrast_is_the_difference_of_two_targets(compressed: Index, method: str) -> None:
    at = [compressed.scores(QUERIES, method=method, target={"label": label}) for label in (2, 0)]
    contrast = compressed.scores(QUERIES, method=method, target=CONTRAST)
    np.testing.assert_allclose(contrast, at[0] - at[1], atol=2e-5 * np.abs(at).max())
    relabelled = compressed.scores([(x, 2) for x, _ in QUERIES], method=method)
    np.testing.assert_allclose(at[0], relabelled, rtol=1e-5, atol=1e-7)


def test_groups_and_means_take_targets(index: Index) -> None:
    scores = index.scores(QUERIES, target=CONTRAST).astype(np.float64)
    (groups,) = index.group_influence(QUERIES, target=CONTRAST, aggregate="mean")
    labels = np.array([label for _, label in ROWS])
    for group in groups:
        np.testing.assert_allclose(group.sum, scores.mean(0)[labels == group.group].sum(), rtol=1e-4, atol=1e-6)
    (mean,) = index.influence(QUERIES, target=CONTRAST, aggregate="mean")
    np.testing.assert_allclose(mean.proponents[0].score, scores.mean(0).max(), rtol=1e-5)


def test_a_query_keeps_its_label_and_loss_whatever_the_target(index: Index) -> None:
    plain = index.influence(QUERIES)
    for asked, words in (
        ({"label": "dog"}, "loss at the label dog"),
        ({"label": 2, "rather_than": "cat"}, "loss at the label bird minus loss at the label cat"),
        ({"label": 1.0, "rather_than": None}, "loss at the label dog"),
    ):
        for own, result in zip(plain, index.influence(QUERIES, target=asked), strict=True):
            assert (result.label, result.prediction, result.target) == (own.label, own.prediction, words)
            np.testing.assert_allclose(result.loss, own.loss, rtol=1e-5)
    unlabelled = index.influence([(x, None) for x, _ in QUERIES], target=CONTRAST)
    for own, result in zip(index.influence(QUERIES, target=CONTRAST), unlabelled, strict=True):
        assert result.label is None
        assert [(hit.row, hit.score) for hit in own.proponents] == [(hit.row, hit.score) for hit in result.proponents]


def test_a_target_takes_the_place_of_a_measurement(tmp_path: Path) -> None:
    index = tiny.build(MarginTask(tiny.mlp, ROWS), tmp_path)
    at_label = index.scores(QUERIES, target={"label": 1})
    np.testing.assert_allclose(at_label, index.scores([(x, 1) for x, _ in QUERIES], target="loss"), rtol=1e-5)


def binary_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]).flatten(), batch[1], reduction="none")


def test_labels_of_two_classes_as_numbers_with_a_point(tmp_path: Path) -> None:
    rows = [(x, torch.tensor(float(y))) for x, y in tiny.classes(30, labels=2)]
    index = tiny.build(tiny.PairTask(tiny.value_mlp, rows, binary_loss), tmp_path)
    flipped = index.scores([(x, torch.tensor(1.0)) for x, _ in rows[:4]])
    np.testing.assert_allclose(index.scores(rows[:4], target={"label": 1}), flipped, rtol=1e-5)
    with pytest.raises(QueryError, match="a class from 0 to 1"):
        index.scores(rows[:4], target={"label": 2})


def test_values_are_targets_too(tmp_path: Path) -> None:
    rows = tiny.values(30)
    index = tiny.build(tiny.ValueTask(tiny.value_mlp, rows), tmp_path)
    others = [(x, torch.tensor(0.25)) for x, _ in rows[:4]]
    np.testing.assert_allclose(index.scores(rows[:4], target={"label": 0.25}), index.scores(others), rtol=1e-5)
    with pytest.raises(QueryError, match="finite number: the labels of this task are values"):
        index.scores(rows[:4], target={"label": float("nan")})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"label": 3}, r"label '3'; give a class from 0 to 2, or one of the names cat, dog, bird"),
        ({"label": -1}, "a class from 0 to 2"),
        ({"label": 0.5}, "a class from 0 to 2"),
        ({"label": True}, "a class from 0 to 2"),
        ({"label": "cow"}, "label 'cow'"),
        ({"label": 1, "rather_than": "wolf"}, "label 'wolf'"),
        ({"label": 1, "rather_than": "dog"}, "are the same"),
        ({"rather_than": 1}, "names no label"),
        ({}, "names no label"),
        ({"label": 1, "than": 2}, "has no 'than'"),
        ("margin", "unknown target 'margin'"),
    ],
)
def test_targets_that_are_refused(index: Index, asked: Any, words: str) -> None:
    with pytest.raises(QueryError, match=words):
        index.influence(QUERIES, target=asked)


def test_similarity_has_no_target(index: Index) -> None:
    with pytest.raises(QueryError, match=r"repsim.*leave target out"):
        index.influence(QUERIES, method="repsim", target={"label": 1})


class NoNumberTask(tiny.PairTask):
    """Two values are learnt of each example."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)


class DictTask(ClassTask):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])  # type: ignore[no-any-return]

    def label(self, example: Any) -> int:
        return int(example["y"])


def test_labels_that_cannot_be_replaced_are_refused_with_the_remedy(tmp_path: Path) -> None:
    several = NoNumberTask(lambda: nn.Linear(5, 2), [(x, x[:2]) for x, _ in ROWS])
    with pytest.raises(QueryError, match=r"NoNumberTask has none that is one number.*define label.*with_label"):
        tiny.build(several, tmp_path / "several").influence(several.train[:1], target={"label": 1})
    as_dicts = DictTask(tiny.mlp, [{"x": x, "y": y} for x, y in ROWS])
    with pytest.raises(QueryError, match=r"cannot take the place of the example's.*define with_label"):
        tiny.build(as_dicts, tmp_path / "dicts").influence(as_dicts.train[:1], target={"label": 1})
