"""`gradtrace select`: losses at checkpoints, the list that build takes, and the plot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import digits_task
from conftest import DigitsRun
from gradtrace.checkpoints import load_checkpoints
from gradtrace.checkpoints.checkpoint import load_into
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.checkpoints.selection import choose
from gradtrace.errors import CheckpointError, MissingLibraryError
from gradtrace_indexer.evaluation.select import explained, mean_losses, plot_selection
from gradtrace_service.cli import app

TASK = f"{digits_task.__file__}:TASK"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve checkpoints of a training that converges."""
    directory = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    network = digits_task.TASK.model()
    images, labels = digits_task.TASK.collate([digits_task.TASK.train[row] for row in range(digits_task.TRAIN_ROWS)])
    recorder = CheckpointRecorder(directory, every=20, batch_size=digits_task.TRAIN_ROWS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.5)
    for _ in range(240):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        recorder.step(network, optimizer)
    return directory


def test_the_losses_are_those_of_the_training_rows(digits_index: DigitsRun) -> None:
    task = digits_task.TASK
    checkpoints = load_checkpoints(digits_index.checkpoints)
    batch = task.collate([task.train[row] for row in range(digits_task.TRAIN_ROWS)])
    wanted = []
    for checkpoint in checkpoints:
        model = task.model()
        load_into(model, checkpoint)
        wanted.append(task.loss(model, batch).mean().item())
    assert mean_losses(task, checkpoints, rows=10_000) == pytest.approx(wanted, rel=1e-5)
    some = mean_losses(task, checkpoints, rows=300, batch_size=70)
    assert some == pytest.approx(wanted, rel=0.2)
    assert some == mean_losses(task, checkpoints, rows=300, batch_size=70)


def test_the_list_is_what_build_takes_and_every_checkpoint_is_explained(many: Path, tmp_path: Path) -> None:
    before = {path.name for path in many.iterdir()}
    plot = tmp_path / "loss.png"
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = CliRunner().invoke(app, ["select", str(many), "--task", TASK, "--count", "4", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in many.iterdir()} == before | {"selected.json"}
    found = load_checkpoints(many)
    losses = mean_losses(digits_task.TASK, found)
    chosen = [found[position] for position in choose(losses, 4)]
    assert load_checkpoints(many / "selected.json") == chosen
    assert [one.step for one in chosen][-1] == 240
    lines = done.output.splitlines()
    assert len(lines) == len(found) + 1
    assert sum("chosen: the loss falls steadily" in line for line in lines) == 3
    assert sum("left out: " in line for line in lines) == 8
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = str(tmp_path / "index")
    built = CliRunner().invoke(
        app, ["build", TASK, "--checkpoints", str(many / "selected.json"), "--out", out, "--dimensions", "32"]
    )
    assert built.exit_code == 0, built.output
    assert "x 4 checkpoints x" in built.output


@pytest.mark.parametrize("out", ["checkpoints.json", "../selected.json", "a.txt", "x/selected.json"])
def test_the_list_stays_in_the_directory_and_replaces_no_other(many: Path, out: str) -> None:
    before = (many / "checkpoints.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"ends in \.json"):
        CliRunner().invoke(app, ["select", str(many), "--task", TASK, "--out", out], catch_exceptions=False)
    assert (many / "checkpoints.json").read_bytes() == before


def test_reasons_for_each_kind(many: Path) -> None:
    checkpoints = load_checkpoints(many)[:8]
    losses = [2.0, 1.5, 1.0, 1.2, 0.5, 0.49999, 0.49998, 0.49997]
    lines = list(explained(checkpoints, losses, choose(losses, 2)))
    assert "whether the loss fell steadily to it is unknown" in lines[0]
    assert "chosen: the loss falls steadily, by 0.5" in lines[1]
    assert "it rises by 0.2" in lines[2]
    assert "hardly falls" in lines[5]
    assert "chosen: the last" in lines[7]


def test_without_matplotlib_the_extra_is_named(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingLibraryError, match=r"gradtrace\[plots\]"):
        plot_selection(load_checkpoints(many)[:2], [1.0, 0.5], [1], tmp_path / "a.png")
