"""A fresh build with the basis of another index: what an updated index must equal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradtrace import Checkpoint, Index, Task, open_index
from gradtrace.checkpoints.indexed import checkpoint_entries
from gradtrace.fingerprint import task_entry
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.build.completion import complete
from gradtrace_indexer.generations import save_pending


def fresh_build(task: Task, checkpoints: Sequence[Checkpoint], directory: Path, like: Path) -> Index:
    """Build `directory` from its beginning, from where the basis is there on: that of the index `like`."""
    directory.mkdir(parents=True)
    shutil.copytree(like / "bases", directory / "bases")
    builder = Builder(task, directory, device="cpu", progress=False)
    rows = np.arange(len(task.train))
    begun = {
        "generation": 1,
        "made_by": "build",
        "complete": False,
        "task": task_entry(task, builder.model(checkpoints[-1]), rows),
        "checkpoints": checkpoint_entries(directory, checkpoints, task),
        "curvature": [],
        "rows": len(rows),
        "row_ids": None,
        "deleted": None,
        "shards": [],
    }
    complete(builder, save_pending(directory, read_manifest(like).model_copy(update=begun)))
    return open_index(directory, task)
