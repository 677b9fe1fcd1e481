"""The examples that benchmarks run on, by name; benchmarks run at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

DATASETS = sorted(file.parent.name for file in Path("examples").glob("*/task.py"))


def task_spec(dataset: str, name: str = "TASK") -> str:
    """The example's task, or another of its file, as `load_task` takes it."""
    return f"examples/{dataset}/task.py:{name}"
