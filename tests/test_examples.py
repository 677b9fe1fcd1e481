from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradtrace.checkpoints import load_checkpoints, load_into
from gradtrace.errors import DatasetError

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = {"digits": (1_500, 297), "mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}
needs_data = pytest.mark.skipif("GRADTRACE_DATA" not in os.environ, reason="GRADTRACE_DATA names no directory of data")


def example(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name / "task.py"))["TASK"]


@pytest.mark.recipe
def test_the_digits_example_trains_a_model_that_its_checkpoints_give_back(tmp_path: Path) -> None:
    task = example("digits")
    trained = runpy.run_path(str(EXAMPLES / "digits/train.py"))
    accuracy = trained["train"](task, tmp_path, epochs=5)
    assert accuracy > 0.85
    checkpoints = load_checkpoints(tmp_path / "checkpoints")
    assert [one.step for one in checkpoints] == [30, 60, 90, 120, 150]
    rates = [one.learning_rate for one in checkpoints]
    assert rates == sorted(rates, reverse=True)
    model = task.model()
    load_into(model, checkpoints[-1])
    assert trained["evaluate"](task, model.eval()) == accuracy


@pytest.mark.recipe
def test_a_training_script_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits/train.py"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "epoch 10 of 10" in done.stdout
    assert len(load_checkpoints(tmp_path / "run/checkpoints")) == 5


@pytest.mark.parametrize(
    ("name", "least", "most"), [("digits", 5_000, 20_000), ("mnist", 235_000, 245_000), ("cifar10", 138_000, 145_000)]
)
def test_the_models_are_of_the_stated_size(name: str, least: int, most: int) -> None:
    model = example(name).model()
    assert least <= sum(weight.numel() for weight in model.parameters()) <= most


@pytest.mark.parametrize("name", ["digits", *(pytest.param(name, marks=needs_data) for name in ("mnist", "cifar10"))])
def test_the_tasks_give_their_data_losses_and_pictures(name: str) -> None:
    task = example(name)
    assert (len(task.train), len(task.query)) == ROWS[name]
    rows = list(range(0, len(task.train), len(task.train) // 64))
    examples = task.train.__getitems__(rows)
    inputs, labels = batch = task.collate(examples)
    assert inputs.dtype == torch.float32
    assert set(labels.tolist()) == set(range(10))
    assert float(inputs.mean().abs()) < 0.5
    assert task.loss(task.model().eval(), batch).shape == (len(rows),)
    for row, fetched in zip(rows[:3], examples, strict=False):
        assert torch.equal(task.train[row][0], fetched[0])
        parsed = task.parse({**task.render(fetched), "label": task.label_name(task.label(fetched))})
        assert torch.equal(parsed[0], fetched[0])
        assert parsed[1] == fetched[1]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_data_the_message_names_the_variable_and_the_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRADTRACE_DATA", raising=False)
    with pytest.raises(DatasetError, match=rf"{name}-train.npz is needed; set GRADTRACE_DATA"):
        len(example(name).train)
    monkeypatch.setenv("GRADTRACE_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=rf"{name}-train.npz is not in .*; set GRADTRACE_DATA"):
        len(example(name).train)


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    augment = runpy.run_path(str(EXAMPLES / "cifar10/train.py"))["augment"]
    torch.manual_seed(0)
    image = torch.arange(3 * 9 * 9, dtype=torch.float32).reshape(1, 3, 9, 9)
    inner = slice(4, -4)  # what no shift of 2 pixels moves beyond the centre's neighbourhood
    seen = set()
    for moved in augment(image.expand(2_000, -1, -1, -1)):
        row, column = divmod(int(moved[0, 4, 4]), 9)
        step = int(moved[0, 4, 5] - moved[0, 4, 4])
        seen.add((row - 4, column - 4, step))
        assert moved[:, inner, inner].flatten().tolist() == [moved[0, 4, 4], moved[0, 4, 4] + 81, moved[0, 4, 4] + 162]
        assert moved[0, 5, 4] - moved[0, 4, 4] == 9
    assert seen == {(down, right, step) for down in range(-2, 3) for right in range(-2, 3) for step in (-1, 1)}
