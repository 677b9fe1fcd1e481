"""Scores of training examples that are in no index, and sums of scores over groups of rows, against plain sums."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import digits_task
import tiny
from gradtrace import GroupInfluence, Index, QueryError, RowFilter, gradients_reference, open_index
from gradtrace.results import groups
from gradtrace_client import AsyncClient, Client, InvalidRequestError
from gradtrace_client.request_schemas import MAX_QUERIES
from gradtrace_indexer import compact, delete_rows
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


def test_rows_without_a_value_are_a_group_of_their_own() -> None:
    columns = {"correct": np.array([True, None, False, None], dtype=object), "label": np.array([0.5, np.nan, 2, 2])}
    scores = np.array([1, 2, 3, 4], dtype=np.float32)
    by_correct = groups.RowGroups(columns, "correct", None).influence(scores)
    assert by_correct == [
        GroupInfluence(None, 2, 6, 3),
        GroupInfluence(False, 1, 3, 3),
        GroupInfluence(True, 1, 1, 1),
    ]
    by_label = groups.RowGroups(columns, "label", np.array([True, True, True, False])).influence(scores)
    assert [(group.group, group.sum) for group in by_label] == [(2, 3), (None, 2), (0.5, 1)]


def test_columns_that_make_no_groups(made: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QueryError, match=r"no column 'colour'.*label, prediction, loss"):
        made.group_influence(QUERIES, by="colour")
    monkeypatch.setattr(groups, "MAX_GROUPS", 10)
    with pytest.raises(QueryError, match=r"loss has .* different values, and 10 groups are the most"):
        made.group_influence(QUERIES, by="loss")


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


def test_a_column_that_is_not_there_is_told(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.groups(query_rows=[0], by="colour")
    assert refused.value.errors[0].field == "by"
