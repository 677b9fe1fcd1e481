from __future__ import annotations

from typing import Any

import pytest

from gradtrace_client.schemas import Hit, IndexInfo, Influence, InfluenceAnswer, QueryInfo, Timing
from gradtrace_service.console import print_answer

pytestmark = pytest.mark.unit


def answer(example: dict[str, Any], label: float, name: str | None) -> InfluenceAnswer:
    shared = {"label": label, "label_name": name, "prediction": label, "prediction_name": name, "loss": 0.25}
    hit = Hit(row=7, score=0.5, correct=None, parts=None, example=example, **shared)
    query = QueryInfo(split="query", row=3, target="loss", example=example, **shared)
    return InfluenceAnswer(
        index=IndexInfo(
            generation=1, task="T", rows=9, checkpoints=[], dimensions=4, basis="spectral", precision="float16"
        ),
        method="tracin",
        convention="Positive: a proponent.",
        exact=True,
        results=[Influence(query=query, proponents=[hit], opponents=[hit], rows_searched=9, rows_touched=1)],
        timing_ms=Timing(queue=0, gradient=0, search=0, render=0, total=0),
    )


@pytest.mark.parametrize(
    ("example", "label", "name", "expected"),
    [
        ({"text": "so [red]bad[/red]\nit is  good"}, 1, "positive", ("so [red]bad[/red] it is good", "positive")),
        (
            {"features": {"rooms": 2127.0, "bedrooms": None, "place": "INLAND"}},
            226_700.0,
            None,
            ("rooms 2,127, bedrooms unknown, place INLAND", "226,700, predicted 226,700 (loss 0.25)"),
        ),
        ({"image": "data:image/png;base64,AAAA"}, 3, "cat", ("cat",)),
        ({}, 3, None, ("3",)),
    ],
)
def test_answers_show_what_a_terminal_can(
    example: dict[str, Any],
    label: float,
    name: str | None,
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_answer(answer(example, label, name))
    shown = capsys.readouterr().out
    assert all(shown.count(words) >= 3 for words in expected), shown  # of the query and of the hit at either end
    assert "base64" not in shown


def test_long_texts_are_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_answer(answer({"text": "word " * 500}, 1, "positive"))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("…") == 3
    assert len(shown.splitlines()) < 40
