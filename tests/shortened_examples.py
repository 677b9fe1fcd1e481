"""The examples with only the first rows of their real data: trained, and their index built, within seconds."""

from __future__ import annotations

import copy
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from gradtrace import Index
from gradtrace.checkpoints import load_checkpoints
from gradtrace_indexer import build_index

EXAMPLES = Path(__file__).parents[1] / "examples"
QUERIES = 200

needs_data = pytest.mark.skipif("GRADTRACE_DATA" not in os.environ, reason="GRADTRACE_DATA names no directory of data")


def example(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name / "task.py"))["TASK"]


def shortened(name: str, rows: int) -> Any:
    """The example's task with so many training rows, and 200 query rows."""
    task = example(name)
    task.train, task.query = _first(task.train, rows), _first(task.query, QUERIES)
    return task


def trained_index(name: str, task: Any, folder: Path, **options: int) -> Index:
    """Of the last two checkpoints of a training by the example's script. options: of its `train`"""
    runpy.run_path(str(EXAMPLES / name / "train.py"))["train"](task, folder, **options)
    checkpoints = load_checkpoints(folder / "checkpoints")[-2:]
    return build_index(task, checkpoints, folder / "index", dimensions=512, progress=False)


def _first(data: Any, rows: int) -> Any:
    part = copy.copy(data)
    part.inputs, part.labels = data.inputs[:rows], data.labels[:rows]
    return part
