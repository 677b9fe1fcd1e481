"""Questions to an open index: what is explained, filters, parts, errors, and that asking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace import Index, InfluenceResult, LossError, QueryError, RowFilter, gradients_reference, open_index
from tiny import ClassTask, PairTask, ValueTask

pytestmark = pytest.mark.unit

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index")
    tiny.build(ClassTask(tiny.mlp, ROWS), directory, basis="spectral", dimensions=30)
    return directory


@pytest.fixture(scope="module")
def index(directory: Path) -> Index:
    return open_index(directory / "index", ClassTask(tiny.mlp, ROWS))


def hits(result: InfluenceResult) -> list[tuple[int, float]]:
    return [(hit.row, hit.score) for hit in [*result.proponents, *result.opponents]]


def same(a: InfluenceResult, b: InfluenceResult) -> None:
    """The same rows; scores to float32 rounding."""
    assert [row for row, _ in hits(a)] == [row for row, _ in hits(b)]
    np.testing.assert_allclose([s for _, s in hits(a)], [s for _, s in hits(b)], rtol=1e-4, atol=1e-6)


# Answers


def test_parts_sum_to_the_score(index: Index) -> None:
    for result in index.influence(QUERIES, k=5):
        for hit in [*result.proponents, *result.opponents]:
            assert list(hit.parts) == ["1.pt", "2.pt"]
            assert math.isclose(sum(hit.parts.values()), hit.score, rel_tol=1e-5, abs_tol=1e-7)
    alone = {name: index.scores(QUERIES, checkpoints=[name]) for name in ("1.pt", "2.pt")}
    for number, result in enumerate(index.influence(QUERIES, k=5)):
        for hit in result.proponents:
            for name, part in hit.parts.items():
                assert math.isclose(part, alone[name][number, hit.row], rel_tol=1e-3, abs_tol=1e-6)


def test_hits_say_what_the_last_checkpoint_says(index: Index) -> None:
    for hit in index.influence(QUERIES[:1], k=60)[0].proponents:
        assert hit.label == ROWS[hit.row][1]
        assert hit.correct == (hit.label == hit.prediction)
        assert math.isclose(hit.loss, index.columns["loss"][hit.row])


def test_same_answer_alone_and_in_a_batch(index: Index) -> None:
    together = index.influence([*QUERIES, *ROWS], k=4)
    for number, result in enumerate(index.influence(QUERIES, k=4)):
        same(result, together[number])
        same(index.influence([QUERIES[number]], k=4)[0], result)
    np.testing.assert_allclose(index.scores(QUERIES)[3:4], index.scores(QUERIES[3:4]), rtol=1e-4, atol=1e-6)


def test_same_answer_after_opening_again(index: Index, directory: Path) -> None:
    again = open_index(directory / "index", ClassTask(tiny.mlp, ROWS))
    assert [hits(a) for a in again.influence(QUERIES)] == [hits(a) for a in index.influence(QUERIES)]


def test_asking_changes_no_file(index: Index, directory: Path) -> None:
    def state() -> dict[Path, Any]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in (directory / "index").rglob("*")}

    before, bytes_before = state(), tiny.files(directory)
    index.influence(QUERIES, filter=RowFilter(labels=[1]))
    index.scores(QUERIES, method="cosine")
    index.self_influence()
    open_index(directory / "index", ClassTask(tiny.mlp, ROWS))
    assert state() == before
    assert tiny.files(directory) == bytes_before


def test_more_hits_than_rows(index: Index) -> None:
    result = index.influence(QUERIES[:1], k=1000)[0]
    rows = [hit.row for hit in [*result.proponents, *result.opponents]]
    assert sorted(rows) == list(range(60))
    assert (len(result.proponents), len(result.opponents)) == tuple(
        np.count_nonzero(sign * index.scores(QUERIES[:1]) > 0) for sign in (1, -1)
    )


# What is explained


def exact_scores(directory: Path, task: PairTask, queries: Sequence[Any], measure: Any = None) -> Tensor:
    """TracInCP from exact gradients. [queries, rows]."""
    total: Any = 0
    for checkpoint in tiny.checkpoints(task, directory / "checkpoints"):
        model = tiny.loaded(task, checkpoint)
        rows = tiny.flat(gradients_reference(task, model, task.train))
        total += checkpoint.learning_rate * tiny.flat(gradients_reference(task, model, queries, measure)) @ rows.T
    return total


def agrees(found: Any, expected: Tensor) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


class MarginTask(ClassTask):
    """Explains how far the label's logit is above the others."""

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        label = (torch.arange(3) == batch[1][:, None]).to(logits.dtype)
        return -((logits * label).sum(1) - (logits - 1e9 * label).logsumexp(1))


def test_measurement_takes_the_place_of_the_loss(tmp_path: Path) -> None:
    task = MarginTask(tiny.mlp, ROWS)
    index = tiny.build(task, tmp_path)
    agrees(index.scores(QUERIES), exact_scores(tmp_path, task, QUERIES, task.measurement))
    agrees(index.scores(QUERIES, target="loss"), exact_scores(tmp_path, task, QUERIES))
    assert [r.target for r in index.influence(QUERIES[:2])] == ["measurement"] * 2
    assert [r.target for r in index.influence(QUERIES[:2], target="loss")] == ["loss"] * 2
    unlabelled = [(x, None) for x, _ in QUERIES]
    predicted = [r.prediction for r in index.influence(unlabelled)]
    assert index.influence(unlabelled)[0].target == "measurement at the predicted label"
    agrees(
        index.scores(unlabelled),
        exact_scores(tmp_path, task, [(x, p) for (x, _), p in zip(QUERIES, predicted, strict=True)], task.measurement),
    )


def test_class_without_a_label_is_the_predicted_one(index: Index, directory: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    model = tiny.loaded(task, tiny.checkpoints(task, directory / "checkpoints")[-1])
    predicted = model(torch.stack([x for x, _ in QUERIES])).argmax(1).tolist()
    results = index.influence([(x, None) for x, _ in QUERIES])
    labelled = index.influence([(x, y) for (x, _), y in zip(QUERIES, predicted, strict=True)])
    for a, b, label in zip(results, labelled, predicted, strict=True):
        same(a, b)
        assert (a.label, a.prediction, a.target) == (None, label, "loss at the predicted label")
        assert (b.label, b.prediction, b.target) == (label, label, "loss")
        assert math.isclose(a.loss, b.loss, rel_tol=1e-5)


def test_labelled_and_unlabelled_queries_together(index: Index) -> None:
    mixed = [(x, None) if number % 2 else (x, y) for number, (x, y) in enumerate(QUERIES)]
    for a, query in zip(index.influence(mixed), mixed, strict=True):
        same(a, index.influence([query])[0])


@pytest.mark.parametrize(
    "task", [ValueTask(tiny.value_mlp, tiny.values(60)), ClassTask(tiny.mlp, [(x, torch.tensor(y)) for x, y in ROWS])]
)
def test_tensor_labels_and_missing_ones_together(tmp_path: Path, task: PairTask) -> None:
    """What is filled in is of the kind that the other labels are, so that all stack."""
    index = tiny.build(task, tmp_path)
    mixed = [task.train[0], (task.train[1][0], None), task.train[2], (task.train[3][0], None)]
    for query, result in zip(mixed, index.influence(mixed), strict=True):
        same(index.influence([query])[0], result)


@dataclass
class ValueData(ValueTask):
    """A task as a data class: it compares by value, and has no hash."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__init__(tiny.value_mlp, tiny.values(60))


def test_value_without_a_label_is_explained_itself(tmp_path: Path) -> None:
    """Proponents are the rows that raised the predicted value: its negative is what they made smaller."""
    task = ValueData()
    index = tiny.build(task, tmp_path)
    queries = [(x, None) for x, _ in tiny.values(5, seed=7)]
    expected = exact_scores(
        tmp_path, task, [(x, torch.tensor(0.0)) for x, _ in queries], lambda m, b: -m(b[0]).flatten()
    )
    agrees(index.scores(queries), expected)
    model = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints")[-1])
    for (x, _), result in zip(queries, index.influence(queries), strict=True):
        assert result.target == "prediction"
        assert result.prediction is not None
        assert math.isclose(result.prediction, float(model(x[None]).detach()), rel_tol=1e-5)
    labelled = tiny.values(5, seed=7)
    agrees(index.scores(labelled), exact_scores(tmp_path, task, labelled))


def test_rows_raise_the_value_that_they_are_proponents_of(tmp_path: Path) -> None:
    """The sign, by taking the step: training on a proponent raises the prediction, on an opponent it lowers it."""
    task = ValueData()
    index = tiny.build(task, tmp_path, count=1)
    query = tiny.values(5, seed=7)[0][0]
    result = index.influence([(query, None)], k=1)[0]
    for hit, sign in ((result.proponents[0], 1), (result.opponents[0], -1)):
        model = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints", 1)[0])
        before = float(model(query[None]).detach())
        task.loss(model, task.collate([task.train[hit.row]])).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 1e-4 * parameter.grad
        assert (float(model(query[None]).detach()) - before) * sign > 0


def test_vector_labels_are_left_alone(tmp_path: Path) -> None:
    """Labels that are no single number: queries have them, and nothing is filled in."""

    class Vectors(PairTask):
        def predict(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).mean(1)

        def with_label(self, example: Any, label: Any) -> Any:
            return example[0], torch.full((3,), float(label))

    rows = [(x, torch.randn(3)) for x, _ in ROWS]
    task = Vectors(tiny.mlp, rows, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1))
    index = tiny.build(task, tmp_path)
    agrees(index.scores(rows[:5]), exact_scores(tmp_path, task, rows[:5]))
    assert index.influence(rows[:1])[0].target == "loss"


def test_query_without_label_or_prediction(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS, lambda model, batch: model(batch[0]).logsumexp(1) - batch[1])
    index = tiny.build(task, tmp_path)
    with pytest.raises(QueryError, match=r"no label.*predict"):
        index.influence([(QUERIES[0][0], None)])


# Filters


@pytest.mark.parametrize(
    ("row_filter", "keep"),
    [
        (RowFilter(labels=[1]), lambda row, index: ROWS[row][1] == 1),
        (RowFilter(labels=(0, 2)), lambda row, index: ROWS[row][1] != 1),
        (RowFilter(correct_only=True), lambda row, index: index.columns["prediction"][row] == ROWS[row][1]),
        (RowFilter(rows=[3, 59, 4]), lambda row, index: row in (3, 59, 4)),
        (RowFilter(rows=np.array([3, 59, 4])), lambda row, index: row in (3, 59, 4)),
        (RowFilter(rows=range(20), exclude_rows=[5]), lambda row, index: row < 20 and row != 5),
        (RowFilter(exclude_rows=torch.arange(50)), lambda row, index: row >= 50),
        (RowFilter(labels=[0], rows=range(30)), lambda row, index: row < 30 and ROWS[row][1] == 0),
        (RowFilter(), lambda row, index: True),
    ],
)
def test_filters(index: Index, row_filter: RowFilter, keep: Any) -> None:
    allowed = [row for row in range(60) if keep(row, index)]
    scores = index.scores(QUERIES)
    for row, result in zip(scores, index.influence(QUERIES, k=100, filter=row_filter), strict=True):
        assert result.rows_searched == len(allowed)
        best, worst = tiny.ends(row[allowed], 100)
        for hits, order in ((result.proponents, best), (result.opponents, worst)):
            assert sorted(hit.row for hit in hits) == sorted(allowed[place] for place in order)
            scores = row[allowed][order]
            np.testing.assert_allclose([hit.score for hit in hits], scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("row_filter", "words"),
    [
        (RowFilter(labels=[9]), "leaves no training row"),
        (RowFilter(rows=[]), "leaves no training row"),
        (RowFilter(rows=[1], exclude_rows=[1]), "leaves no training row"),
        (RowFilter(rows=[60]), "row 60; rows are 0 to 59"),
        (RowFilter(exclude_rows=[-1]), "row -1; rows are 0 to 59"),
        (RowFilter(rows=np.arange(60) < 5), "row numbers"),
        (RowFilter(rows=[1.5]), "row numbers"),
    ],
)
def test_filters_that_are_refused(index: Index, row_filter: RowFilter, words: str) -> None:
    with pytest.raises(QueryError, match=words):
        index.influence(QUERIES, filter=row_filter)


# Refused questions


def test_wrong_questions(index: Index) -> None:
    for k in (0, -1):
        with pytest.raises(QueryError, match="k must be at least 1"):
            index.influence(QUERIES, k=k)
    for ask in (index.influence, index.scores):
        with pytest.raises(QueryError, match="no example"):
            ask([])
        with pytest.raises(QueryError, match="unknown target 'label'"):
            ask(QUERIES, target="label")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_query_that_is_not_finite(index: Index, value: float) -> None:
    bad = (torch.full((5,), value), 1)
    for ask in (index.influence, index.scores):
        with pytest.raises(LossError, match="NaN or infinite"):
            ask([QUERIES[0], bad])


def test_many_queries_are_taken_in_parts(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is larger than the index allows, however many examples are asked about at once."""
    largest = 0
    collate = index.task.collate

    def recorded(examples: list[Any]) -> Any:
        nonlocal largest
        largest = max(largest, len(examples))
        return collate(examples)

    monkeypatch.setattr(index.task, "collate", recorded)
    queries = [(x, None) for x, _ in ROWS * 3]
    assert index.scores(queries).shape == (180, 60)
    assert largest <= 64
