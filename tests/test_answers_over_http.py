"""Targets, histograms, probabilities, clusters and comparisons over HTTP, beside what the library answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

import digits_task
import tiny
from conftest import DigitsRun, serving_when_ready
from gradtrace import Index
from gradtrace_client import AsyncClient, Client, InvalidRequestError
from gradtrace_indexer import delete_rows
from gradtrace_service.app import create_service
from gradtrace_service.cli import app
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import DEFAULTS

TASK = digits_task.TASK
CONTRAST = {"label": "eight", "rather_than": 3}


def test_a_contrast_over_http(client: Client, index: Index) -> None:
    answer = client.influence(query_rows=[0, 4], target=CONTRAST, k=5)
    expected = index.influence([TASK.query[0], TASK.query[4]], target=CONTRAST, k=5)
    for result, own in zip(answer.results, expected, strict=True):
        assert [hit.row for hit in result.proponents] == [hit.row for hit in own.proponents]
        assert result.query.target == "loss at the label eight minus loss at the label three"
        assert result.query.label == own.label
    groups = client.groups(query_rows=[0], target={"label": 8})
    assert groups.results[0].groups[0].group == index.group_influence([TASK.query[0]], target={"label": 8})[0][0].group
    pairs = client.pairs(train_rows=[5, 6], query_rows=[0], target=CONTRAST)
    own_pairs = index.pairs([TASK.train[5], TASK.train[6]], [TASK.query[0]], target=CONTRAST)
    np.testing.assert_allclose(pairs.scores, own_pairs, rtol=1e-4, atol=1e-8)
    contrast = "loss at the label eight minus loss at the label three"
    assert [query.target for query in pairs.queries] == [contrast]
    assert [row.target for row in pairs.train] == [None, None]
    assert groups.results[0].query.target == "loss at the label eight"
    assert "its loss at the label eight</" in groups._repr_html_()
    (mean,) = client.groups(query_rows=[0, 4], aggregate="mean").results
    assert (mean.query.target, mean.query.count) == ("loss", 2)


def test_histogram_and_probabilities_over_http(client: Client, index: Index) -> None:
    (result,) = client.influence(query_rows=[0], include=["histogram", "probabilities"]).results
    scores = index.scores([TASK.query[0]])[0]
    assert result.distribution is not None
    assert result.distribution.histogram is not None
    edges, counts = result.distribution.histogram.edges, result.distribution.histogram.counts
    assert (len(edges), len(counts), sum(counts)) == (61, 60, digits_task.TRAIN_ROWS)
    np.testing.assert_allclose([edges[0], edges[-1]], [scores.min(), scores.max()], rtol=1e-4)
    classes = result.query.probabilities
    assert classes is not None
    assert len(classes) == 10
    assert classes[0].label == result.query.prediction
    assert [entry.label_name for entry in classes] == [digits_task.NAMES[int(entry.label)] for entry in classes]
    assert abs(sum(entry.probability for entry in classes) - 1) < 1e-6
    plain = client.influence(query_rows=[0]).results[0]
    assert (plain.distribution, plain.query.probabilities) == (None, None)


@pytest.mark.parametrize(
    ("target", "field", "remedy"),
    [
        ("margin", "target", 'give "loss", or an object with label'),
        (3, "target", 'give "loss", or an object with label'),
        ({}, "target.label", "required"),
        ({"label": 10}, "target", "a class from 0 to 9, or one of the names zero"),
        ({"label": "<b>"}, "target", "a class from 0 to 9"),
        ({"label": [1]}, "target.label", "a number or the name of a class"),
        ({"label": "n" * 300}, "target.label", "a number or the name of a class"),
        ({"label": 1, "rather_than": 1}, "target", "are the same"),
        ({"label": 1, "instead": 2}, "target.instead", ""),
    ],
)
def test_wrong_targets_are_told_the_field(client: Client, target: Any, field: str, remedy: str) -> None:
    for call in (client.influence, client.groups):
        with pytest.raises(InvalidRequestError) as refused:
            call(query_rows=[0], target=target)
        (error,) = refused.value.errors
        assert error.field == field
        assert remedy in error.detail
    assert client.influence(query_rows=[0], method="graddot", target={"label": 1}).results
    with pytest.raises(InvalidRequestError) as refused:
        client.influence(query_rows=[0], method="repsim", target={"label": 1})
    assert refused.value.errors[0].field == "target"


def test_the_command_line_takes_targets(url: str) -> None:
    words = ["query", url, "--query-row", "0", "--target-label", "eight", "--rather-than", "3", "--k", "2"]
    answer = json.loads(CliRunner().invoke(app, [*words, "--include", "probabilities", "--json"]).stdout)
    assert answer["results"][0]["query"]["target"] == "loss at the label eight minus loss at the label three"
    shown = CliRunner().invoke(app, [*words, "--include", "probabilities"]).stdout
    assert "loss at the label eight minus" in shown
    assert "Probabilities: " in shown
    alone = CliRunner().invoke(app, ["query", url, "--query-row", "0", "--rather-than", "3"])
    assert "--rather-than belongs to --target-label" in str(alone.exception)


# Clusters


def test_clusters_over_http(client: Client, index: Index) -> None:
    asked: dict[str, Any] = {"k": 40, "include": ["clusters"]}
    (result,) = client.influence(query_rows=[0], **asked).results
    (own,) = index.influence([TASK.query[0]], **asked)
    assert [hit.cluster for hit in result.proponents] == [hit.cluster for hit in own.proponents]
    assert all(hit.cluster is None for hit in client.influence(query_rows=[0]).results[0].proponents)
    with pytest.raises(InvalidRequestError, match="clusters are of 1000 hits"):
        client.influence(query_rows=[0, 1], k=501, include=["clusters"])


# Comparisons


def test_two_methods_are_compared(client: Client, index: Index) -> None:
    answer = client.compare({"query_rows": [0]}, {"query_rows": [0], "method": "influence", "damping": 0.5}, k=7)
    first, second = index.scores([TASK.query[0]])[0], index.scores([TASK.query[0]], method="influence", damping=0.5)[0]
    assert answer.pearson == pytest.approx(stats.pearsonr(first, second).statistic, rel=1e-4)
    assert answer.spearman == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-3)
    assert answer.rows == digits_task.TRAIN_ROWS == len(answer.points.row)
    np.testing.assert_allclose(answer.points.first, first[answer.points.row], rtol=1e-3, atol=1e-5 * first.max())
    np.testing.assert_allclose(answer.points.second, second[answer.points.row], rtol=1e-3, atol=1e-5 * second.max())
    hits = [
        {hit.row for hit in client.influence(query_rows=[0], k=7, **side).results[0].proponents}
        for side in ({}, {"method": "influence", "damping": 0.5})
    ]
    assert answer.overlap.proponents == len(hits[0] & hits[1])
    assert (answer.first.method, answer.second.method) == ("tracin", "influence")
    assert "times the number of training rows" in answer.second.convention
    assert f"Pearson correlation {answer.pearson:.3f}" in answer.summary()
    assert len(answer.to_pandas()) == answer.rows


def test_two_queries_and_targets_are_compared(client: Client, index: Index, url: str) -> None:
    same = client.compare({"query_rows": [0]}, {"query_rows": [0]})
    assert same.pearson == pytest.approx(1)
    assert same.overlap.proponents == 10
    sides: list[dict[str, Any]] = [{"query_rows": [0, 4]}, {"train_rows": [7], "target": CONTRAST}]
    answer = client.compare(*sides)
    mean = index.scores([TASK.query[0], TASK.query[4]]).mean(0)
    contrast = index.scores([TASK.train[7]], target=CONTRAST)[0]
    assert answer.pearson == pytest.approx(stats.pearsonr(mean, contrast).statistic, abs=1e-4)
    assert answer.first.query.count == 2
    assert (answer.second.query.split, answer.second.query.row) == ("train", 7)
    assert answer.second.target == "loss at the label eight minus loss at the label three"

    async def again() -> Any:
        async with AsyncClient(url) as other:
            return await other.compare(*sides)

    assert asyncio.run(again()).points == answer.points


def test_two_indexes_are_compared(tmp_path: Path, digits_index: DigitsRun) -> None:
    """One has lost rows, another is of other data."""
    shutil.copytree(digits_index.index, tmp_path / "fewer")
    delete_rows(tmp_path / "fewer", [2, 3])
    tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(30)), tmp_path / "other")
    (tmp_path / "task.py").write_text("import tiny\n\nTASK = tiny.ClassTask(tiny.mlp, tiny.classes(30))\n")
    settings = DEFAULTS.model_copy(update={"checkpoints": None})
    services = [
        Hosted("whole", digits_index.index, digits_index.task, [digits_index.checkpoints]),
        Hosted("fewer", tmp_path / "fewer", digits_index.task, [digits_index.checkpoints]),
        Hosted("other", tmp_path / "other" / "index", f"{tmp_path / 'task.py'}:TASK"),
    ]
    with serving_when_ready(create_service(services, settings)) as url, Client(url) as client:
        answer = client.compare({"query_rows": [0], "index": "whole"}, {"query_rows": [0], "index": "fewer"})
        assert answer.pearson == pytest.approx(1)
        assert answer.rows == digits_task.TRAIN_ROWS - 2
        assert not {2, 3} & set(answer.points.row)
        assert answer.second.index.generation > answer.first.index.generation
        with pytest.raises(InvalidRequestError, match="400 and 30 training rows") as refused:
            client.compare({"query_rows": [0]}, {"train_rows": [0], "index": "other"})
        assert refused.value.errors[0].field == "second.index"
        with pytest.raises(InvalidRequestError, match="there is no index 'none'"):
            client.compare({"query_rows": [0]}, {"train_rows": [0], "index": "none"})


@pytest.mark.parametrize(
    ("second", "field", "remedy"),
    [
        ({}, "second", "exactly one of example"),
        ({"query_rows": [99]}, "second.query_rows[0]", "0 to 59"),
        ({"query_rows": [0], "method": "magic"}, "second.method", "tracin"),
        ({"query_rows": [0], "checkpoints": ["none"]}, "second.checkpoints[0]", "there is no"),
        ({"query_rows": [0], "target": {"label": 10}}, "second.target", "0 to 9"),
        ({"query_rows": [0], "k": 3}, "second.k", ""),
        ({"query_rows": [0], "filter": {"rows": [1]}}, "second.filter", ""),
        ({"example": {"image": [[1]], "label": 1}}, "second.example", "8"),
        ({"query_rows": list(range(50)) * 3}, "second.query_rows", "128"),
    ],
)
def test_wrong_comparisons_are_told_the_field(client: Client, second: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.compare({"query_rows": [0]}, second)
    (error,) = refused.value.errors
    assert error.field == field
    assert remedy in error.detail
    with pytest.raises(InvalidRequestError):
        client.compare({"query_rows": [0]}, {"query_rows": [0]}, k=501)
