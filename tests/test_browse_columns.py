"""Columns and the overview over real HTTP; every figure is compared with the data and a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import digits_task
import gradtrace
import tiny
from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace import Index
from gradtrace_client import Client, ColumnsAnswer
from gradtrace_indexer import delete_rows
from gradtrace_service.answers.columns import shortened
from gradtrace_service.app import create_app
from plain_forward import Expected, of_digits, of_last_digits
from small_tasks import HOUSES, house_task

TASK = digits_task.TASK


@pytest.fixture(scope="module")
def expected(digits_index: DigitsRun) -> dict[str, Expected]:
    return of_last_digits(digits_index)


def points(client: Client, split: Any, *names: str, **options: Any) -> ColumnsAnswer:
    """The columns once nothing of them is pending."""
    wait_until(lambda: client.columns(split, names, **options).pending == 0)
    return client.columns(split, names, **options)


@pytest.mark.parametrize("split", ["train", "query"])
def test_columns_hold_the_values_of_all_rows(client: Client, expected: dict[str, Expected], split: Any) -> None:
    answer, known = points(client, split, "label", "prediction", "loss", "correct"), expected[split]
    assert answer.rows == list(range(len(known.labels)))
    assert (answer.rows_total, answer.sampled) == (len(known.labels), False)
    assert answer.columns["label"] == known.labels.tolist()
    assert answer.columns["prediction"] == known.predictions.tolist()
    assert answer.columns["correct"] == (known.labels == known.predictions).tolist()
    np.testing.assert_allclose(np.array(answer.columns["loss"], dtype=float), known.losses, rtol=1e-4, atol=1e-6)


def test_columns_of_training_rows_have_norms_and_self_influence(client: Client, index: Index) -> None:
    answer = points(client, "train", "norm", "self_influence")
    expected = np.stack([index.columns["norm"], index.self_influence()], 1)
    np.testing.assert_allclose(answer.to_pandas()[["norm", "self_influence"]].to_numpy(), expected, rtol=1e-6)
    first = client.self_influence(k=1).results[0]
    assert int(np.argmax(np.array(answer.columns["self_influence"], dtype=float))) == first.row


def test_columns_of_many_rows_are_evenly_spaced(client: Client) -> None:
    answer = points(client, "train", "label", k=5)
    assert answer.sampled
    assert answer.rows == [0, 100, 200, 299, 399]
    assert answer.columns["label"] == [TASK.train[row][1] for row in answer.rows]
    assert "5 of 400 rows of train, evenly spaced: label" in answer._repr_html_()


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ("train?k=3", "names", "required"),
        ("train?names=label&k=100001", "k", "less than or equal to 100000"),
        ("train?names=labels", "names[0]", "there is no 'labels'; this index has label, prediction"),
        (
            "query?names=label&names=norm",
            "names[1]",
            "there is no 'norm'; this index has label, prediction, loss, corr",
        ),
        ("train?names=feature:pixel", "names[0]", "there is no 'feature:pixel'"),
        ("train?" + "&".join(["names=loss"] * 9), "names", "at most 8 items"),
        ("train?names=loss&name=loss", "name", "no such field"),
        ("test?names=loss", "split", "'train' or 'query'"),
    ],
)
def test_columns_that_are_not_there_are_refused(url: str, asked: str, field: str, words: str) -> None:
    response = httpx.get(f"{url}/columns/{asked}")
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["field"] == field
    assert words.lower() in error["detail"].lower()


def test_columns_of_features_are_those_of_the_table(tmp_path: Path) -> None:
    index = tiny.build(house_task(), tmp_path)
    delete_rows(index.directory, [0])
    names = ("feature:age", "feature:rooms", "feature:place", "label")
    reopened = gradtrace.open_index(index.directory, index.task)
    with serving_when_ready(create_app(reopened)) as url, Client(url) as client:
        train, query = points(client, "train", *names), points(client, "query", *names)
    assert (train.rows, train.rows_total) == (list(range(1, 20)), 19)
    for answer, table in ((train, HOUSES[1:]), (query, HOUSES[:4])):
        for name, column in zip(names, zip(*table, strict=True), strict=False):
            assert answer.columns[name] == list(column)
    assert query.columns["label"] == [1.5, 2.0, 3.0, 4.0]


class Table(tiny.ClassTask):
    """Renders features of its own, and fails to for one class."""

    def render(self, example: Any) -> dict[str, Any]:
        if example[1] == 2:
            raise ValueError("no")
        width = float(example[0][0])
        return {"features": {"width": width, "name": "wide" if width > 0 else "narrow", "more": [1]}}


def test_features_of_a_task_of_one_s_own_are_those_that_it_renders(tmp_path: Path) -> None:
    data = [(x, 0 if row == 1 else label) for row, (x, label) in enumerate(tiny.classes(3000))]
    with serving_when_ready(create_app(tiny.build(Table(tiny.mlp, data), tmp_path))) as url, Client(url) as client:
        answer = points(client, "train", "feature:width", "feature:name", "feature:more", "label")
    assert (len(answer.rows), answer.rows_total, answer.sampled) == (2000, 3000, True)
    assert answer.columns["label"] == [data[row][1] for row in answer.rows]
    shown = [None if label == 2 else float(x[0]) for x, label in (data[row] for row in answer.rows)]
    assert answer.columns["feature:width"] == shown
    words = [None if width is None else "wide" if width > 0 else "narrow" for width in shown]
    assert answer.columns["feature:name"] == words
    assert set(answer.columns["feature:more"]) == {None}


def test_numbers_are_written_shortly() -> None:
    values = np.array([0.1, -1234.5678, 0.0, 1e-30, 3e38, 16777217, np.nan, np.inf], dtype=np.float32)
    short = shortened(values.astype(np.float64))
    np.testing.assert_allclose(short, values, rtol=1e-7)
    assert short[0] == 0.1


def test_the_overview_sums_up_classes_and_checkpoints(
    client: Client, digits_index: DigitsRun, expected: dict[str, Expected]
) -> None:
    wait_until(lambda: client.overview().pending == 0)
    overview = client.overview()
    checkpoints, known = gradtrace.load_checkpoints(digits_index.checkpoints), expected["train"]
    for told, checkpoint in zip(overview.loss_by_checkpoint, checkpoints, strict=True):
        assert (told.name, told.step, told.run) == (checkpoint.name, checkpoint.step, 0)
        assert told.mean_loss == pytest.approx(of_digits(checkpoint, "train").losses.mean(), rel=1e-4)
    assert [label.label for label in overview.labels] == list(range(10))
    for label in overview.labels:
        of_class = known.labels == label.label
        assert (label.rows, label.label_name) == (of_class.sum(), digits_task.NAMES[int(label.label)])
        assert label.correct == (known.predictions[of_class] == label.label).sum()
        assert label.mean_loss == pytest.approx(known.losses[of_class].mean(), rel=1e-4)
    assert overview.coordinates is None
    assert (overview.index.generation, overview.index.rows) == (1, 400)
    assert list(overview.to_pandas()["label_name"]) == list(digits_task.NAMES)
    assert overview._repr_html_().count("<tr>") == 11


def test_the_overview_has_a_histogram_of_losses(client: Client, expected: dict[str, Expected]) -> None:
    histogram, losses = client.overview().loss_histogram, expected["train"].losses
    assert histogram is not None
    edges = np.array(histogram.edges)
    assert (len(edges), sum(histogram.counts)) == (len(histogram.counts) + 1, 400)
    np.testing.assert_allclose(edges[2:] / edges[1:-1], edges[2] / edges[1])
    for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False):
        slack = 1e-4 * high + 1e-6  # stored losses are of float32
        assert ((losses > low + slack) & (losses < high - slack)).sum() <= count
        assert count <= ((losses > low - slack) & (losses < high + slack)).sum()


def test_the_overview_of_values_has_no_classes_but_maybe_a_map(tmp_path: Path) -> None:
    task = house_task()
    task.feature_names, task.fill = ("Latitude", "longitude", "place"), {"Latitude": 20.0}
    with serving_when_ready(create_app(tiny.build(task, tmp_path))) as url, Client(url) as client:
        overview = client.overview()
    assert overview.labels == []
    assert overview.coordinates == ["longitude", "Latitude"]
    assert sum(overview.loss_histogram.counts if overview.loss_histogram else []) == 20
