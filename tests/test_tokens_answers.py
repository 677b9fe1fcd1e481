"""Scores by token over HTTP, in the SDK and on the command line: those of the library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from gradtrace import Index
from gradtrace.tasks import TextClassification, Vocabulary
from gradtrace_client import Client
from gradtrace_client.token_schemas import TokenShares
from gradtrace_service.app import create_app
from gradtrace_service.cli import app
from gradtrace_service.console import print_tokens
from gradtrace_service.server import serving
from small_tasks import Words

TEXTS = [f"the <b>film</b> number {row} was {'fine' if row % 2 else 'dull'}" for row in range(12)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    vocabulary, data = Vocabulary(TEXTS, 50), (TEXTS, [row % 2 for row in range(len(TEXTS))])
    task = TextClassification(
        Words,
        data,
        data,
        vocabulary_size=50,
        encode=lambda text: vocabulary.encode(text, 20),
        decode=vocabulary.decode,
        class_names=("dull", "fine"),
    )
    return tiny.build(task, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def url(index: Index) -> Iterator[str]:
    with serving(create_app(index)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_answers_are_those_of_the_library(index: Index, client: Client) -> None:
    target = {"label": "fine", "rather_than": "dull"}
    answer = client.tokens([7, 2, 7], query_rows=[3], method="graddot", target=target)
    expected = index.token_scores(index.task.query[3], [7, 2, 7], method="graddot", target=target)
    assert answer.query.target == expected[0].target == "loss at the label fine minus loss at the label dull"
    assert (answer.query.split, answer.query.row) == ("query", 3)
    for result, split in zip(answer.results, expected, strict=True):
        assert (result.row, result.score) == (split.row, split.score)
        assert result.tokens == split.training.tokens
        assert answer.query_tokens == split.query.tokens
        for shares, scores in ((result.training, split.training), (result.query, split.query)):
            assert shares == TokenShares.model_validate(asdict(scores))
    frame = answer.to_pandas()
    assert len(frame) == sum(len(result.tokens) + len(answer.query_tokens) for result in answer.results)
    shown = answer._repr_html_()
    assert "<b>" not in shown
    assert "row 7" in shown


def test_an_index_tells_which_methods_split_by_token(client: Client, tmp_path: Path) -> None:
    details = client.index()
    assert {"tracin", "cosine"} <= set(details.token_methods) <= set(details.methods) - {"repsim", "representer"}
    index = tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(9)), tmp_path)
    with serving(create_app(index)) as url, Client(url) as other:
        assert other.index().token_methods == []
        refused = other._http.post("/influence/tokens", json={"train_rows": [0], "rows": [1]})
    assert refused.status_code == 422
    assert "ClassTask does not tell the tokens" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [0] * 33}, "rows"),
        ({"rows": [3, 99]}, "rows[1]"),
        ({"query_rows": [1, 2]}, ""),
        ({"query_rows": [60]}, "query_rows[0]"),
        ({"method": "none"}, "method"),
        ({"k": 3}, "k"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(client: Client, fields: Any, field: str) -> None:
    refused = client._http.post("/influence/tokens", json={"rows": [3], "query_rows": [1], **fields})
    assert refused.status_code == 422, refused.text
    assert [problem["field"] for problem in refused.json()["errors"]] == [field]


def test_the_command_line_marks_strong_tokens(url: str, client: Client) -> None:
    shown = invoke("query", url, "--query-row", 3, "--k", 2, "--tokens")
    (result,) = client.influence(query_rows=[3], k=2).results
    hits = [*result.proponents, *result.opponents]
    assert re.findall(r"^row (\d+), score", shown, re.MULTILINE) == [str(hit.row) for hit in hits]
    answer = client.tokens([hits[0].row], query_rows=[3])
    strongest = max(range(len(answer.query_tokens)), key=lambda at: abs(answer.results[0].query.scores[at]))
    sign = "+" if answer.results[0].query.scores[strongest] > 0 else "-"
    assert f"{{{sign}{answer.query_tokens[strongest].strip()}{sign}}}" in shown
    told = json.loads(invoke("query", url, "--query-row", 3, "--k", 2, "--tokens", "--json"))
    assert [entry["row"] for entry in told["tokens"]["results"]] == [hit.row for hit in hits]
    assert told["tokens"]["results"][0] == answer.results[0].model_dump()
    refused = CliRunner().invoke(app, ["query", url, "--query-row", "3", "--query-row", "4", "--tokens"])
    assert "one query" in str(refused.exception)


def test_colours_tell_strength_and_sign(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    print_tokens(client.tokens([4], query_rows=[3]))
    shown = capsys.readouterr().out
    colours = re.findall(r"48;2;(\d+);(\d+);0m", shown)
    assert colours
    assert all("0" in pair for pair in colours)  # red or green
    assert max(int(part) for pair in colours for part in pair) == 220  # the strongest token
    assert "{+" not in shown
