"""What a new user meets in the first hour: mistakes, bad rows, what is lost and how it comes back."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from gradtrace import CheckpointError, Index, LossError, QueryError, open_index
from gradtrace.methods import METHODS
from gradtrace_indexer import add_kernels, compact, delete_rows, fit_representer, set_searcher
from gradtrace_indexer.update.update import update_index
from gradtrace_service import cli
from gradtrace_service.app import create_app
from gradtrace_service.server import serving
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(70, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small index that answers by most methods."""
    directory = tmp_path_factory.mktemp("index")
    tiny.build(ClassTask(tiny.mlp, ROWS), directory, basis="spectral", dimensions=30)
    fit_representer(directory / "index")
    return directory / "index"


@pytest.fixture(scope="module")
def index(directory: Path) -> Index:
    return open_index(directory, ClassTask(tiny.mlp, ROWS))


BAD = (torch.full((5,), float("nan")), 1)


@pytest.mark.parametrize("method", ["tracin", "cosine", "influence", "repsim", "representer"])
@pytest.mark.parametrize("bad", [{1}, {0, 2}, {65, 68}], ids=str)
def test_queries_without_a_finite_loss_are_named(index: Index, method: str, bad: set[int]) -> None:
    queries = [BAD if number in bad else query for number, query in enumerate(QUERIES)]
    numbers = ", ".join(map(str, sorted(bad)))
    with pytest.raises(LossError, match=f"query {numbers}, counted from 0: .*NaN or infinite") as raised:
        index.influence(queries, method=method)
    assert set(raised.value.positions) == bad


@pytest.mark.parametrize("method", ["tracin", "repsim"])
def test_training_examples_of_pairs_without_a_finite_loss_are_named(index: Index, method: str) -> None:
    with pytest.raises(LossError, match="training example 2, counted from 0") as raised:
        index.pairs([*ROWS[:2], BAD], QUERIES[:3], method=method)
    assert raised.value.positions == [2]


def test_what_a_change_of_rows_takes_away_is_told_with_what_brings_it_back(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(directory.parent, tmp_path / "run") / "index"
    add_kernels(path, progress=False)
    set_searcher(path, ClassTask(tiny.mlp, ROWS), "faiss:Flat", progress=False)
    assert not caplog.messages
    delete_rows(path, [3])
    trak, representer = caplog.messages
    assert f"generation 5 of {path} no longer answers by trak" in trak
    assert "run `gradtrace kernels` on it" in trak
    assert "no longer answers by representer" in representer
    assert "run `gradtrace representer` on it again" in representer
    opened = open_index(path, ClassTask(tiny.mlp, ROWS))
    with pytest.raises(QueryError, match="run `gradtrace kernels` on it"):
        opened.influence(QUERIES[:1], method="trak")
    caplog.clear()
    compact(path, progress=False)
    (searcher,) = caplog.messages
    assert "no longer uses searcher faiss:Flat" in searcher
    assert "`gradtrace build` sets it again" in searcher
    caplog.clear()
    fit_representer(path)
    add_kernels(path, progress=False)
    assert not caplog.messages
    assert {"trak", "representer"} <= set(open_index(path, ClassTask(tiny.mlp, ROWS)).methods)


def test_every_method_that_an_index_lacks_has_a_command(index: Index) -> None:
    bare = index.manifest.model_copy(update={"curvature": [], "representations": None, "representer": None})
    lacking = [method.lacks(bare) for method in METHODS.values()]
    assert sum(why is not None for why in lacking) == len(METHODS) - 4  # all but tracin, graddot, cosine and bm25
    assert all("`gradtrace " in why for why in lacking if why is not None)


TASK_FILE = """
import torch
import torch.nn.functional as F
from torch import nn
import gradtrace

class MyTask(gradtrace.Task):
    train = [(torch.randn(5, generator=torch.Generator().manual_seed(row)), row % 3) for row in range(20)]

    def model(self):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predict(self, model, batch):
        return model(batch[0])
"""
MISTAKES = {  # what is written in place of what, and what the command says
    "import": ("import torch\n", "import nothing_there\n", "No module named 'nothing_there' (my_task.py, line 2"),
    "name": (
        "import gradtrace\n",
        "import gradtrace\nprint(x)\n",
        "'x' is not defined (my_task.py, line 6: `print(x)`)",
    ),
    "syntax": ("import gradtrace\n", "import gradtrace\nx = (3\n", "failed: SyntaxError"),
    "exit": ("import gradtrace\n", "import gradtrace\nexit(3)\n", "ended the program (3): put the code that runs it"),
    "train": ("train = [", "train = {} and [", "task.train must be a map-style data set"),
    "model": ("return nn.Seq", "nn.Seq", "MyTask.model() returned None, not a torch.nn.Module"),
    "loss": (
        "batch[1], ",
        "batch[2], ",
        "IndexError: list index out of range (my_task.py, line 14, in loss: `return F.",
    ),
    "in torch": (
        "model(batch[0]), b",
        "model(batch[0].long()), b",
        "RuntimeError: mat1 and mat2 must have the same dtype",
    ),
    "prediction": (
        "        return model(batch[0])\n",
        "        model(batch[0])\n",
        "predict(model, batch) returned None for 2",
    ),
    "shape": ("return model(batch[0])\n", "return model(batch[0]).flatten()\n", "returned a tensor [6] for 2 examples"),
    "label": (
        "    def predict",
        "    label = lambda self, example: 'cat'\n\n    def predict",
        "returned 'cat' of type str",
    ),
    "classes": (
        "    def predict",
        "    class_names = 5\n\n    def predict",
        "MyTask.class_names is 5: give a list of words",
    ),
    "reading": (
        "    def predict",
        "    collate = lambda self, examples: examples[0].x\n\n    def predict",
        "'tuple' object has no attribute 'x' (my_task.py, line 16, in <lambda>: `collate =",
    ),
}


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit code of a command that fails in this process."""
    monkeypatch.setattr(sys, "argv", ["gradtrace", *words])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    return ending.value.code


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_the_task_is_one_line_that_shows_the_users_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    assert old in TASK_FILE
    (tmp_path / "my_task.py").write_text(TASK_FILE.replace(old, new))
    tiny.checkpoints(ClassTask(tiny.mlp, ROWS), tmp_path / "checkpoints")
    listed = [{"file": f"{n}.pt", "step": 10 * n, "learning_rate": 0.1} for n in (1, 2)]
    (tmp_path / "checkpoints" / "checkpoints.json").write_text(json.dumps({"checkpoints": listed}))
    command = ["build", f"{tmp_path / 'my_task.py'}:MyTask", "--checkpoints", str(tmp_path / "checkpoints")]
    assert ended(monkeypatch, *command, "--out", str(tmp_path / "index"), "--dimensions", "9") == 1
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradtrace_indexer.generations.discard", attrgetter("ours"))
    monkeypatch.setattr(sys, "argv", ["gradtrace", "discard", "nowhere"])
    with pytest.raises(AttributeError, match="ours"):
        cli.main()


def test_a_refusal_is_printed_once(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(create_app(open_index(directory, ClassTask(tiny.mlp, ROWS)))) as url:
        assert ended(monkeypatch, "query", url, "--train-row", "99") == 1
    assert capsys.readouterr().err.count("there is no row 99") == 1


def test_the_version_is_told() -> None:
    shown = CliRunner().invoke(cli.app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"gradtrace {version('gradtrace')} (torch {version('torch')}, Python 3.")


def test_interrupted_it_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(
        TASK_FILE.replace("import torch\n", "import time, torch\nprint('reading', flush=True)\ntime.sleep(60)\n")
    )
    command = [sys.executable, "-m", "gradtrace_service", "build", f"{tmp_path / 'my_task.py'}:MyTask"]
    command += ["--checkpoints", str(tmp_path), "--out", str(tmp_path / "index")]
    (tmp_path / "checkpoints.json").write_text('{"checkpoints": []}')
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as build:
        assert build.stdout is not None
        assert "reading" in build.stdout.readline()
        build.send_signal(signal.SIGINT)
        _, told = build.communicate(timeout=60)
    assert build.returncode == 130
    assert told.strip() == "interrupted; run a build, update or evaluation again to resume it"


def test_an_update_with_a_wrong_directory_of_checkpoints_changes_nothing(tmp_path: Path) -> None:
    rows = tiny.classes(40)
    tiny.build(ClassTask(tiny.mlp, rows[:30]), tmp_path)
    before = tiny.files(tmp_path / "index")
    with pytest.raises(CheckpointError, match="no directory"):
        update_index(tmp_path / "index", ClassTask(tiny.mlp, rows), tmp_path / "nowhere", progress=False)
    assert tiny.files(tmp_path / "index") == before
