"""Targets, histograms and probabilities over HTTP and on the command line, beside what the library answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import digits_task
from gradtrace import Index
from gradtrace_client import Client, InvalidRequestError
from gradtrace_service.cli import app

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
