"""`gradtrace.check`: what is said of tasks, right and wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import gradtrace
import tiny
from gradtrace import MismatchError, SlowPathWarning, TaskError
from gradtrace_service.cli import app
from tiny import ClassTask, PairTask

ROWS = tiny.classes(40)
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "task.py"


def test_a_plain_classifier(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    report = gradtrace.check(task, tiny.checkpoints(task, tmp_path))
    assert report.ok
    assert [(line.name, line.kind, line.path, line.reason) for line in report.layers] == [
        ("0", "Linear", "fast", ""),
        ("2", "Linear", "fast", ""),
    ]
    assert (report.rows, report.checkpoints, report.parameters, report.labels) == (40, 2, 39, "loss")
    assert "categorical over 3 classes (cross_entropy)" in report.law
    assert "log odds of each row's label" in report.curvature
    hooks = {hook.hook: hook.outcome for hook in report.hooks}
    model = tiny.loaded(task, tiny.checkpoints(task, tmp_path)[-1])
    rows = gradtrace.data.sample.varied_rows(task)[:3]
    expected = [int(model(ROWS[row][0]).argmax()) for row in rows]
    assert hooks["predict"] == ", ".join(map(str, expected))
    assert hooks["representation"] == "4 features of 2"
    assert report.estimate is not None
    assert report.estimate.disk_bytes > 2 * 40 * 39
    passes = (2 * (2 * 40 + 40) + 40) / report.estimate.rows_per_second  # for the rotation, the rows and the fit
    assert report.estimate.seconds > passes
    json.dumps(report.to_dict())


class Scaled(nn.Module):
    """A scale that is read as a number: nothing but autograd can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.scale * 2 if float(x.sum()) > 0 else self.scale)


def by_row(model: nn.Module, batch: Any) -> Tensor:
    logits = torch.stack([model(x) for x in batch[0]])
    return F.cross_entropy(logits, batch[1], reduction="none")


def test_what_is_slow_is_told_with_its_reason_and_remedy(tmp_path: Path) -> None:
    task = PairTask(Scaled, ROWS, by_row)
    report = gradtrace.check(task, tiny.checkpoints(task, tmp_path, 1))
    assert report.ok
    assert {line.name: line.path for line in report.layers}["scale"] == "one by one"
    assert re.search(r"slow path: 1 of 2 layers \(scale\).*rows a second.*layers = ", report.notes[0])


def test_a_slow_layer_can_be_left_out(tmp_path: Path) -> None:
    task = PairTask(Scaled, ROWS, by_row)
    task.layers = ["!scale"]
    index = tiny.build(task, tmp_path, count=1)
    assert index.manifest.task.layers == ["!scale"]
    assert index.manifest.basis.dimensions == 18
    with pytest.warns(SlowPathWarning):
        tiny.build(PairTask(Scaled, ROWS, by_row), tmp_path / "whole", count=1)
    with pytest.raises(MismatchError, match=r"layers = \['!scale'\], the task has None"):
        gradtrace.open_index(tmp_path / "index", PairTask(Scaled, ROWS, by_row))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        pytest.param(["2.*"], ["2.weight", "2.bias"], marks=pytest.mark.long),
        pytest.param(["!*.bias"], ["0.weight", "2.weight"], marks=pytest.mark.long),
        (["*.weight", "!0.*"], ["2.weight"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_patterns_of_layers(tmp_path: Path, patterns: list[str] | None, names: list[str]) -> None:
    task = PairTask(tiny.mlp, ROWS)
    task.layers = patterns
    report = gradtrace.check(task, tiny.checkpoints(task, tmp_path, 1))
    sizes = {name: value.numel() for name, value in tiny.mlp().named_parameters()}
    assert report.ok, report.problems
    assert report.parameters == sum(sizes[name] for name in names)


@pytest.mark.parametrize("patterns", [["encoder.*"], ["!nothing"], [], "0.*", ["0.*", "!*"]])
def test_wrong_patterns(tmp_path: Path, patterns: Any) -> None:
    task = PairTask(tiny.mlp, ROWS)
    task.layers = patterns
    with pytest.raises(TaskError, match="layers"):
        tiny.build(task, tmp_path, count=1)


def test_problems_are_listed_with_their_remedies(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    report = gradtrace.check(task, tiny.checkpoints(PairTask(tiny.mlp, ROWS), tmp_path))
    assert not report.ok
    assert 'reduction="none"' in report.problems[0]
    assert "no checkpoint" in gradtrace.check(PairTask(tiny.mlp, ROWS), []).problems[0]


def test_command_line(tmp_path: Path) -> None:
    from gradtrace_indexer.task_loading import load_task

    task = load_task(f"{DIGITS}:TASK")
    torch.manual_seed(0)
    torch.save(task.model().state_dict(), tmp_path / "a.pt")
    entry = {"file": "a.pt", "step": 1, "learning_rate": 0.1}
    (tmp_path / "checkpoints.json").write_text(json.dumps({"checkpoints": [entry]}))
    arguments = ["check", f"{DIGITS}:TASK", "--checkpoints", str(tmp_path)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for words in ("Conv2d", "fast", "categorical over 10 classes", "A build would take about", "Ready to build"):
        assert words in shown.output
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert report["ok"]
    assert len(report["layers"]) == 3
