from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from gradtrace.errors import TaskError
from gradtrace.task import Task
from gradtrace_indexer.task_loading import load_task

pytestmark = pytest.mark.unit

TASK = """
import torch
from torch import nn
from gradtrace.task import Task
from dataclasses import dataclass
from sizes import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Linear(Task):
    def __init__(self, width=Settings().width):
        self.width = width
        self.train = [(torch.zeros(width), 0)]
    def model(self): return nn.Linear(self.width, 2)
    def loss(self, model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

class Needy(Linear):
    def __init__(self, width): super().__init__(width)

wide = Linear(7)
number = 3
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "sizes.py").write_text("WIDTH = 5\n")
    path = tmp_path / "types.py"  # a name that the standard library uses too
    path.write_text(TASK)
    return path


def test_loads_a_class_or_an_instance_from_a_file(task_file: Path) -> None:
    made, given = load_task(f"{task_file}:Linear"), load_task(f"{task_file}:wide")
    assert isinstance(made, Task)
    assert made.model().in_features == 5
    assert given.model().in_features == 7
    import types

    assert hasattr(types, "SimpleNamespace")


def test_loads_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sizes.py").write_text("WIDTH = 5\n")
    (tmp_path / "my_models_for_loading.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    assert load_task("my_models_for_loading:wide").model().in_features == 7


def test_what_was_loaded_anew_lives_no_longer_than_it_is_used(task_file: Path) -> None:
    first = load_task(f"{task_file}:wide", anew=True)
    lives = weakref.ref(first)
    second = load_task(f"{task_file}:wide", anew=True)
    assert first is not second
    assert first.model().in_features == second.model().in_features == 7
    del first
    gc.collect()
    assert lives() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "has no 'Missing'; tasks found there: Linear, Needy, wide"),
        ("number", "is of type int, not a gradtrace.Task"),
        ("Needy", "Needy.. failed: TypeError.* without arguments"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_there(task_file: Path, name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(f"{task_file}:{name}")


def test_a_wrong_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(TaskError, match="there is no file"):
        load_task(f"{tmp_path}/none.py:task")
    with pytest.raises(TaskError, match="importing no_such_package failed: ModuleNotFoundError"):
        load_task("no_such_package:task")
    with pytest.raises(TaskError, match=r"importing .*broken.py failed: .*no_such_module_anywhere"):
        load_task(f"{tmp_path}/broken.py:task")
    with pytest.raises(TaskError, match="module:attribute"):
        load_task("task.py")


def test_what_a_task_imports_is_run_anew_too(tmp_path: Path) -> None:
    """Its data may be read by a module beside it."""
    (tmp_path / "data_beside_a_task.py").write_text(
        "from pathlib import Path\nWIDTH = int(Path(__file__).with_name('width').read_text())\n"
    )
    (tmp_path / "task.py").write_text(TASK.replace("from sizes", "from data_beside_a_task"))
    (tmp_path / "width").write_text("5")
    first = load_task(f"{tmp_path}/task.py:Linear", anew=True)
    (tmp_path / "width").write_text("6")
    second = load_task(f"{tmp_path}/task.py:Linear", anew=True)
    assert [task.model().in_features for task in (first, second)] == [5, 6]
    assert load_task(f"{tmp_path}/task.py:Linear").model().in_features == 6


def test_a_module_that_cannot_be_run_twice_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "registers_itself.py").write_text(
        "import sys\nassert not hasattr(sys, 'registered_by_a_test'), 'twice'\nsys.registered_by_a_test = WIDTH = 5\n"
    )
    (tmp_path / "task.py").write_text(TASK.replace("from sizes", "from registers_itself"))
    for _ in range(2):
        assert load_task(f"{tmp_path}/task.py:Linear", anew=True).model().in_features == 5
