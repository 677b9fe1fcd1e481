"""What users get wrong in Python: an error that names the remedy, in place of one from deep inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradtrace
import tiny
from gradtrace import QueryError, TaskError
from gradtrace_indexer import build_index
from tiny import ClassTask

pytestmark = pytest.mark.unit

ROWS = tiny.classes(20)


class OwnTask(ClassTask):
    def __init__(self) -> None:
        super().__init__(tiny.mlp, ROWS)


@pytest.mark.parametrize("task", [OwnTask, object()], ids=["class", "object"])
def test_no_task(tmp_path: Path, task: Any) -> None:
    remedy = r"pass an instance, OwnTask\(\)" if task is OwnTask else "subclass gradtrace.Task"
    found = tiny.checkpoints(OwnTask(), tmp_path / "checkpoints")
    tiny.build(OwnTask(), tmp_path)
    with pytest.raises(TaskError, match=remedy):
        build_index(task, found, tmp_path / "other", progress=False)
    with pytest.raises(TaskError, match=remedy):
        gradtrace.open_index(tmp_path / "index", task)
    (problem,) = gradtrace.check(task, found).problems
    assert problem.startswith("the task is ")


@pytest.mark.parametrize("method", ["influence", "scores"])
def test_one_example_in_place_of_a_list(tmp_path: Path, method: str) -> None:
    index = tiny.build(OwnTask(), tmp_path)
    with pytest.raises(QueryError, match=r"pass \[example\]"):
        getattr(index, method)(ROWS[0])
    getattr(index, method)(ROWS[:2])


def test_paths_may_be_strings(tmp_path: Path) -> None:
    task = OwnTask()
    (found, *_) = tiny.checkpoints(task, tmp_path)
    checkpoint = gradtrace.Checkpoint(str(found.path), 1, 0.1)  # type: ignore[arg-type]
    assert checkpoint.name == found.name
    build_index(task, [checkpoint], str(tmp_path / "index"), progress=False)


def test_the_directory_of_the_checkpoints_is_enough(tmp_path: Path) -> None:
    task = OwnTask()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradtrace.CheckpointRecorder(tmp_path / "checkpoints", every=1) as recorder:
        recorder.step(model, optimizer)
    index = build_index(task, tmp_path / "checkpoints", tmp_path / "index", progress=False)
    assert len(index.manifest.checkpoints) == 1
