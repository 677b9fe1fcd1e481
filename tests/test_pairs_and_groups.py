"""Scores of training examples that are in no index, and sums of scores over groups of rows, against plain sums."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import digits_task
import tiny
from conftest import serving_when_ready
from gradtrace import GroupInfluence, Index, QueryError, RowFilter, gradients_reference, open_index
from gradtrace.results import groups
from gradtrace_client import AsyncClient, Client, InvalidRequestError
from gradtrace_client.request_schemas import MAX_QUERIES
from gradtrace_indexer import compact, delete_rows
from gradtrace_service.app import create_app
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(7, seed=5)
TASK = digits_task.TASK


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """All coordinates are kept; some rows are deleted, so that positions are not row numbers."""
    directory = tmp_path_factory.mktemp("made")
    task = ClassTask(tiny.mlp, ROWS)
    tiny.build(task, directory)
    delete_rows(directory / "index", [0, 7, 8])
    compact(directory / "index", progress=False)
    delete_rows(directory / "index", [20])
    return open_index(directory / "index", task)


@pytest.mark.parametrize("method", ["tracin", "graddot", "cosine"])
def test_pairs_of_real_rows_have_the_scores_of_the_index(made: Index, method: str) -> None:
    scores = made.scores(QUERIES, method=method)
    pairs = made.pairs([ROWS[3], ROWS[59]], QUERIES, method=method)
    assert pairs.dtype == np.float32
    np.testing.assert_allclose(pairs, scores[:, [3, 59]], rtol=5e-3, atol=1e-3 * np.nanmax(np.abs(scores)))


def test_pairs_of_hypothetical_examples_are_inner_products_of_their_gradients(made: Index, tmp_path: Path) -> None:
    """150 of them, more than go through the model together; to float32, for nothing is rounded."""
    train = tiny.classes(150, seed=77)
    expected = torch.zeros(len(QUERIES), len(train), dtype=torch.float64)
    for checkpoint in tiny.checkpoints(made.task, tmp_path):
        model = tiny.loaded(made.task, checkpoint)
        q, r = (tiny.flat(gradients_reference(made.task, model, some)) for some in (QUERIES, train))
        expected += checkpoint.learning_rate * q @ r.T
    np.testing.assert_allclose(made.pairs(train, QUERIES), expected, rtol=1e-3, atol=1e-5)
    alone = made.pairs(train[:2], QUERIES[:1], checkpoints=["2.pt"], weights="equal")
    assert alone.shape == (1, 2)


def test_pairs_that_cannot_be_scored(made: Index) -> None:
    with pytest.raises(QueryError, match="no training example"):
        made.pairs([], QUERIES)
    with pytest.raises(QueryError, match="training example 1 has no label"):
        made.pairs([ROWS[0], (ROWS[1][0], None)], QUERIES)
    with pytest.raises(QueryError, match="unknown method"):
        made.pairs(ROWS[:1], QUERIES, method="magic")


@pytest.mark.parametrize("method", ["tracin", "cosine"])
@pytest.mark.parametrize("by", ["label", "prediction", "correct"])
@pytest.mark.parametrize("asked", [{}, {"filter": RowFilter(rows=range(4, 40))}, {"aggregate": "mean"}], ids=str)
def test_groups_are_sums_of_all_scores(
    made: Index, method: str, by: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradtrace.index._SCORES_TOGETHER", 130)  # two queries at a time
    scores = made.scores(QUERIES, method=method).astype(np.float64)
    scores = scores.mean(0, keepdims=True) if "aggregate" in asked else scores
    counted = made.present.copy()
    if "filter" in asked:
        counted[[*range(4), *range(40, 60)]] = False
    values = made.columns[by][counted]
    found = made.group_influence(QUERIES, by=by, method=method, **asked)
    assert len(found) == len(scores)
    for own, result in zip(scores, found, strict=True):
        assert {group.group for group in result} == set(values.tolist())
        assert [group.sum for group in result] == sorted((group.sum for group in result), reverse=True)
        for group in result:
            some = own[counted][values == group.group]
            assert type(group.group) is (bool if by == "correct" else int)
            assert group.rows == len(some)
            assert group.sum == pytest.approx(some.sum(), rel=1e-4, abs=1e-5)
            assert group.mean == pytest.approx(some.mean(), rel=1e-4, abs=1e-5)


class Furnished(ClassTask):
    """Rows with features, which some rows do not have: a town, a number of rooms, a size in square metres."""

    def render(self, example: Any) -> dict[str, Any]:
        return {"features": {"town": town(example), "rooms": rooms(example), "size": size(example)}}


def town(example: Any) -> str | None:
    return None if example[0][0] > 1 else f"town {example[1]}"


def rooms(example: Any) -> int:
    return int(example[0][1] * 2)


def size(example: Any) -> float | None:
    return None if example[0][2] > 1.2 else float(example[0][2])


@pytest.fixture(scope="module")
def furnished(made: Index) -> Index:
    return open_index(made.directory, Furnished(tiny.mlp, ROWS))


@pytest.mark.parametrize("value", [town, rooms], ids=["town", "rooms"])
def test_groups_by_a_feature_are_sums_of_all_scores(furnished: Index, value: Any) -> None:
    scores = furnished.scores(QUERIES).astype(np.float64)
    for most in (60, 50):
        rows = [row for row in range(most) if furnished.present[row]]
        expected: dict[Any, list[int]] = {}
        for row in rows:
            expected.setdefault(value(ROWS[row]), []).append(row)
        answers = furnished.group_influence(QUERIES, by=f"feature:{value.__name__}", filter=RowFilter(rows=range(most)))
        for own, answer in zip(scores, answers, strict=True):
            assert {group.group: group.rows for group in answer} == {name: len(of) for name, of in expected.items()}
            for group in answer:
                assert group.sum == pytest.approx(own[expected[group.group]].sum(), rel=1e-4, abs=1e-5)
                assert (type(group.group), group.bounds) in ((str, None), (int, None), (type(None), None))


@pytest.mark.parametrize("by", ["feature:size", "loss", "norm"])
def test_numbers_are_grouped_in_ranges_of_about_as_many_rows(furnished: Index, by: str) -> None:
    rows = np.flatnonzero(furnished.present)
    values = [size(ROWS[row]) for row in rows] if by == "feature:size" else furnished.columns[by][rows].tolist()
    scores = furnished.scores(QUERIES)[:, rows].astype(np.float64)
    for own, answer in zip(scores, furnished.group_influence(QUERIES, by=by), strict=True):
        unknown = [at for at, value in enumerate(values) if value is None]
        assert [group.rows for group in answer if group.group is None] == [len(unknown)] * bool(unknown)
        ranges = sorted((group for group in answer if group.group is not None), key=lambda group: group.bounds or ())
        assert len(ranges) == 10
        assert sum(group.rows for group in answer) == len(rows)
        assert all(one.bounds[1] < other.bounds[0] for one, other in itertools.pairwise(ranges))  # type: ignore[index]
        for group in ranges:
            low, high = group.bounds  # type: ignore[misc]
            assert group.group == f"{low:.7g} to {high:.7g}"
            inside = [at for at, value in enumerate(values) if value is not None and low <= value <= high]
            assert group.rows == len(inside)
            assert abs(group.rows - (len(rows) - len(unknown)) / 10) <= 1.5
            assert group.sum == pytest.approx(own[inside].sum(), rel=1e-4, abs=1e-5)
            assert {values[at] for at in inside} >= {low, high}


def by_numbers(cells: Any, by: str = "feature:size") -> groups.GroupInfluences:
    numbers = np.array(cells, dtype=np.float64)
    return groups.RowGroups(by, numbers, np.arange(len(cells))).influence(np.ones(len(cells), dtype=np.float32))


def test_rows_of_one_value_are_never_apart() -> None:
    """Most houses have no garden: ranges are fewer then."""
    answer = by_numbers([0.0] * 80 + [number + 0.5 for number in range(20)])
    assert {(group.group, group.rows) for group in answer} == {(0, 80), ("0.5 to 9.5", 10), ("10.5 to 19.5", 10)}


def test_many_whole_numbers_are_grouped_in_ranges_and_few_others_by_value() -> None:
    assert len(by_numbers(range(1_000))) == 1_000
    assert sorted(group.rows for group in by_numbers(range(1_001))) == [100] * 9 + [101]
    assert {group.group for group in by_numbers([0.5, 1, 2.5, 0.5, np.nan])} == {0.5, 1, 2.5, None}


def grouped(by: str, cells: Any, positions: Any = range(4)) -> groups.GroupInfluences:
    scores = np.array([1, 2, 3, 4], dtype=np.float32)
    return groups.RowGroups(by, cells, np.array(positions)).influence(scores)


def test_rows_without_a_value_are_a_group_of_their_own() -> None:
    assert grouped("correct", np.array([True, None, False, None], dtype=object)) == [
        GroupInfluence(None, 2, 6, 3),
        GroupInfluence(False, 1, 3, 3),
        GroupInfluence(True, 1, 1, 1),
    ]
    by_label = grouped("label", np.array([0.5, np.nan, 2]), range(3))
    assert [(group.group, group.sum) for group in by_label] == [(2, 3), (None, 2), (0.5, 1)]
    by_town = grouped("feature:town", ["Bree", None, "Bree", 7.5])  # a task may give anything
    assert [(group.group, group.sum) for group in by_town] == [("Bree", 4), ("7.5", 4), (None, 2)]


def test_columns_that_make_no_groups(made: Index, furnished: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QueryError, match=r"no column 'colour'.*label, prediction, loss"):
        made.group_influence(QUERIES, by="colour")
    with pytest.raises(QueryError, match=r"no column 'feature:colour'.*norm, feature:town, feature:rooms"):
        furnished.group_influence(QUERIES, by="feature:colour")
    monkeypatch.setattr(groups, "MAX_GROUPS", 2)
    for by in ("label", "feature:town"):
        with pytest.raises(QueryError, match=rf"{by} has .* different values, and 2 groups are the most"):
            furnished.group_influence(QUERIES, by=by)


# Over HTTP


def payload(row: int, label: int | None = None) -> dict[str, Any]:
    image = TASK.normalise.inverse(TASK.query[row][0])[:, :, 0]
    found: dict[str, Any] = {"image": [[int(value) for value in line] for line in image]}
    return found if label is None else found | {"label": label}


def test_pairs_over_http(client: Client, url: str, index: Index) -> None:
    """The same image with its own and with a wrong label, and two rows, on two queries."""
    label = TASK.query[9][1]
    wrong = (label + 1) % 10
    answer = client.pairs([payload(9, label), payload(9, wrong)], train_rows=[5, 6], query_rows=[9, 3])
    image = TASK.query[9][0]
    train = [(image, label), (image, wrong), TASK.train[5], TASK.train[6]]
    np.testing.assert_allclose(answer.scores, index.pairs(train, [TASK.query[9], TASK.query[3]]), rtol=1e-4, atol=1e-7)
    assert answer.scores[0][0] > 0
    assert answer.scores[0][1] < answer.scores[0][0]
    assert [one.row for one in answer.train] == [None, None, 5, 6]
    assert answer.train[1].label_name == digits_task.NAMES[wrong]
    assert [one.row for one in answer.queries] == [9, 3]
    assert "Positive: a proponent" in answer.convention
    assert answer.to_pandas().shape == (2, 4)

    async def again() -> Any:
        async with AsyncClient(url) as other:
            return await other.pairs(train_rows=[5], example=payload(3), method="graddot")

    found = asyncio.run(again())
    expected = index.pairs([TASK.train[5]], [(TASK.query[3][0], None)], method="graddot")
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "field", "remedy"),
    [
        ({"train_rows": [0]}, "", "exactly one of example, examples, query_rows"),
        ({"query_rows": [0]}, "", "train_examples, train_rows or both"),
        ({"query_rows": [0], "train_rows": [400]}, "train_rows[0]", "0 to 399"),
        ({"query_rows": [0], "train_rows": [0] * (MAX_QUERIES + 1)}, "train_rows", str(MAX_QUERIES)),
        ({"query_rows": [99], "train_rows": [0]}, "query_rows[0]", "0 to 59"),
        ({"query_rows": [0], "train_examples": [payload(0, 3), payload(0)]}, "train_examples[1]", "no label"),
        ({"query_rows": [0], "train_examples": [{"image": [[1]], "label": 1}]}, "train_examples[0]", "8"),
        ({"query_rows": [0], "train_rows": [0], "method": "magic"}, "method", "tracin"),
    ],
)
def test_wrong_pairs_are_told_the_field(client: Client, asked: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.pairs(**asked)
    (error,) = refused.value.errors
    assert error.field == field
    assert remedy in error.detail


def test_groups_over_http(client: Client, index: Index) -> None:
    answer = client.groups(query_rows=[0, 4], by="prediction", filter={"correct_only": True})
    expected = index.group_influence(
        [TASK.query[0], TASK.query[4]], by="prediction", filter=RowFilter(correct_only=True)
    )
    for result, own in zip(answer.results, expected, strict=True):
        assert [(group.group, group.rows) for group in result.groups] == [(group.group, group.rows) for group in own]
        np.testing.assert_allclose([group.sum for group in result.groups], [g.sum for g in own], rtol=1e-4, atol=1e-7)
        assert result.groups[0].group_name == digits_task.NAMES[result.groups[0].group]  # type: ignore[index]
    assert (answer.results[1].query.row, answer.by) == (4, "prediction")
    mean = client.groups(query_rows=[0, 4], by="correct", aggregate="mean")
    assert mean.results[0].query.count == 2
    assert {group.group for group in mean.results[0].groups} <= {True, False}
    assert all(isinstance(group.group, bool) for group in mean.results[0].groups)
    assert len(mean.to_pandas()) == len(mean.results[0].groups)


def test_groups_by_a_feature_over_http(furnished: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_when_ready(create_app(furnished)) as url, Client(url) as client:
        for by in ("feature:town", "feature:size", "loss"):
            (result,) = client.groups(train_rows=[3], by=by).results
            (expected,) = furnished.group_influence([ROWS[3]], by=by)
            answered = [(group.group, group.rows, group.bounds) for group in result.groups]
            assert answered == [(group.group, group.rows, group.bounds) for group in expected]
            np.testing.assert_allclose(
                [group.sum for group in result.groups], [group.sum for group in expected], rtol=1e-4
            )
            assert {group.group_name for group in result.groups} == {None}
        assert "town 1" in client.groups(train_rows=[3], by="feature:town")._repr_html_()
        monkeypatch.setattr("gradtrace_service.answers.groups_and_pairs.READ_ROWS", 10)
        with pytest.raises(InvalidRequestError, match="row by row, of 10 rows at most and not of 56"):
            client.groups(train_rows=[3], by="feature:town")


def test_a_query_is_resolved_once(furnished: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be explained comes from the pass that explains it."""
    unlabelled = (ROWS[4][0], None)
    with pytest.raises(QueryError, match="no label"):
        furnished.pairs([unlabelled], QUERIES)
    (query,) = furnished.queries([unlabelled])
    assert query.target == "loss at the predicted label"
    expected = furnished.group_influence([unlabelled], by="label")
    monkeypatch.setattr("gradtrace.results.asked.resolve_queries", None)  # nothing is left to resolve
    assert furnished.group_influence([query], by="label") == expected


@pytest.mark.parametrize("column", ["colour", "feature:colour"])
def test_a_column_that_is_not_there_is_told(client: Client, column: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.groups(query_rows=[0], by=column)
    assert refused.value.errors[0].field == "by"
