"""What `render` gives goes into answers as JSON; what it cannot give is told before anybody asks, or in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import digits_task
import tiny
from conftest import DigitsRun
from gradtrace import Task
from gradtrace.errors import TaskError
from gradtrace.tasks import TabularClassification
from gradtrace.tasks.hooks import check_hooks, rendered
from gradtrace_client import Client
from gradtrace_service.answers.rendering import RenderedRows
from gradtrace_service.app import create_app, create_service
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

pytestmark = pytest.mark.unit


class Shows(tiny.ClassTask):
    """Renders an example as what `shown` makes of its row number."""

    def __init__(self, shown: Any) -> None:
        super().__init__(tiny.mlp, [(x, y) for x, y in tiny.classes(12)])
        self.shown = shown

    def render(self, example: Any) -> Any:
        number = next(row for row, (x, _) in enumerate(self.train) if x.equal(example[0]))
        return self.shown(number)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(2), 2),
        (torch.tensor([1.5, 2.5], dtype=torch.bfloat16), [1.5, 2.5]),
        (np.arange(3, dtype=np.uint8), [0, 1, 2]),
        ((1, [np.float64(2)]), [1, [2.0]]),
        (float("nan"), None),
        (torch.tensor([0.0, torch.inf]), [0.0, None]),
        ({"deep": {"er": np.str_("word")}}, {"deep": {"er": "word"}}),
        ("\ud800 é", "? é"),
        (None, None),
    ],
)
def test_what_is_nearly_json_is_made_it(value: Any, expected: Any) -> None:
    found = rendered(Shows(lambda _: {"value": value}), tiny.classes(12)[0])
    assert json.loads(json.dumps(found, allow_nan=False)) == {"value": expected}


@pytest.mark.parametrize(
    ("rendering", "told"),
    [
        ({"value": torch.zeros(3, 8, 8)}, r"render\['value'\] is a Tensor of shape \[3, 8, 8\].*tolist.*encode_image"),
        ({"value": np.zeros((2, 2))}, r"ndarray of shape \[2, 2\].*tolist"),
        ({"value": b"png"}, r"is bytes.*base64"),
        ({"value": [1, {2, 3}]}, r"render\['value'\]\[1\] is set.*texts, numbers"),
        ({3: "value"}, r"has the key 3.*str\(key\)"),
        ("text", "returns a str, not a dict such as"),
        (None, "returns a NoneType, not a dict"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_the_remedy(rendering: Any, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        rendered(Shows(lambda _: rendering), tiny.classes(12)[0])


def test_a_row_that_cannot_be_rendered_fails_neither_the_answer_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def shown(number: int) -> dict[str, Any]:
        if number % 3 == 0:
            raise OSError("a secret place")
        return {"text": str(number)} if number % 3 == 1 else {"text": b"bytes"}

    index = tiny.build(Shows(shown), tmp_path)
    with serving(create_app(index)) as url, Client(url, retries=0) as client:
        for _ in range(2):
            result = client.influence(train_rows=[0], k=12).results[0]
            hits = [*result.proponents, *result.opponents]
            by_row = {hit.row: hit.example for hit in hits}
        query = client.influence(train_rows=[2]).results[0].query.example
        alone = client.examples("train", 3).example
        line = next(hit.example_text() for hit in hits if hit.row == 2)
    assert len(by_row) >= 4
    for row, example in by_row.items():
        assert example is not None
        if row % 3 == 1:
            assert example == {"text": str(row)}
        else:
            assert ("(OSError)" if row % 3 == 0 else "base64") in example["error"]
    assert query == by_row.get(2, query)
    assert alone is not None
    assert "log says why" in alone["error"]
    assert "not shown: Shows.render['text'] is bytes" in line
    assert "secret" not in str(by_row)
    assert caplog.text.count("cannot be rendered; further") == 2  # once of each kind
    assert "a secret place" in caplog.text


def test_errors_are_not_kept() -> None:
    failing = [True]

    def shown(number: int) -> dict[str, Any]:
        if failing[0]:
            raise OSError("for now")
        return {"text": str(number)}

    rows = RenderedRows(Shows(shown))
    assert "error" in rows(3)
    failing[0] = False
    assert rows(3) == {"text": "3"}


_BROKEN = """
from digits_task import *
from gradtrace.tasks import ImageClassification

class Broken(ImageClassification):
    def render(self, example):
        {body}

TASK = Broken(model, train=lambda: load(slice(TRAIN_ROWS)), class_names=NAMES)
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return {'image': example[0]}", r"Broken.render\['image'\] is a Tensor of shape \[1, 8, 8\]"),
        ("return {'size': example.size}", r"Broken.render fails on training row 0: AttributeError: .* fix it"),
    ],
)
def test_serve_tries_to_render(digits_index: DigitsRun, tmp_path: Path, body: str, told: str) -> None:
    (tmp_path / "task.py").write_text(_BROKEN.format(body=body))
    broken = Hosted("broken", digits_index.index, f"{tmp_path}/task.py:TASK")
    with pytest.raises(TaskError, match=told):
        broken.open_or_say_why()
    with pytest.raises(IndexUnavailableError, match=told):
        create_service([broken], Settings(processes=0))
    sound = Hosted("sound", digits_index.index, digits_index.task)
    with serving(create_service([sound, broken], Settings(processes=0))) as url:
        assert httpx.get(f"{url}/index").status_code == 200
        assert httpx.get(f"{url}/index", params={"index": "broken"}).status_code == 503


def checked(task: Task, rows: int = 3) -> dict[str, tuple[str, bool]]:
    checks = check_hooks(task, [task.train[row] for row in range(rows)])
    return {check.hook: (check.outcome, check.problem) for check in checks}


def test_the_hooks_of_ready_made_tasks_are_shown() -> None:
    found = checked(digits_task.TASK)
    label = digits_task.TASK.train[0][1]
    assert found["label"] == (f"{label} ({digits_task.NAMES[label]})", False)
    assert found["render"][0].startswith('{"image": "data:image/png;base64,')
    assert found["parse"] == ("reads what render gives, with and without a label", False)
    names = tuple("abcde")
    table = TabularClassification(tiny.mlp, (np.zeros((4, 5)), np.zeros(4)), feature_names=names)
    assert checked(table)["parse"] == ("reads what render gives, with and without a label", False)


def test_the_hooks_of_a_plain_task_are_told() -> None:
    found = checked(tiny.ClassTask(tiny.mlp, tiny.classes(12)))
    assert found["render"] == ("nothing: hits are shown by row, label and score alone", False)
    assert found["parse"] == ("not defined: examples are asked about by query_rows or train_rows alone", False)


def test_what_is_wrong_with_hooks_is_told() -> None:
    class Wrong(Shows):
        def label(self, example: Any) -> Any:
            return "three"

        def parse(self, payload: Any) -> Any:
            return torch.zeros(7), payload["label"]

    found = checked(Wrong(lambda number: {"text": "sound"} if number == 0 else {"text": b"1"}))
    assert found["label"][1]
    assert "return an int, a float or None" in found["label"][0]
    assert found["render"][1]
    assert "fails on example 1 of 3" in found["render"][0]
    sizes = checked(Wrong(lambda _: {"text": "sound"}))["parse"]
    assert sizes[1]
    assert "parse fails on example 0" in sizes[0]


def test_a_parse_of_another_form_is_no_problem() -> None:
    class Other(Shows):
        def parse(self, payload: Any) -> Any:
            return torch.tensor(payload["x"]), payload["label"]

    outcome, problem = checked(Other(lambda _: {"text": "sound"}))["parse"]
    assert not problem
    assert "not tried" in outcome
    assert checked(Other(lambda _: {"x": [0.0] * 5}))["parse"] == ("needs a label", False)
