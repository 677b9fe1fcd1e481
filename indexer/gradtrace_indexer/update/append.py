"""Append the training rows that a data set has grown by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typing_extensions import Unpack

from gradtrace.data.guards import check_dataset
from gradtrace.errors import StoreError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import Manifest, read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build.builder import Builder, PassOptions
from gradtrace_indexer.generations import save_pending, successor, updating
from gradtrace_indexer.searchers.build import refresh_searcher
from gradtrace_indexer.writing.files import write_ids


def append_rows(path: str | Path, task: Task, *, skip_bad_rows: bool = False, **passes: Unpack[PassOptions]) -> Index:
    """Index the rows that task.train has beyond those of the index, publish them as one generation, and open it.

    Their ids are their numbers in task.train; they get shards of their own. Without new rows the index is opened as it
    is. What an interrupted call began is finished first.

    Args:
        skip_bad_rows: as in `build_index`.
        passes: see `PassOptions`.

    Raises:
        StoreError: no index, or one with a recording of its training; another update unfinished or running, a full
            disk; or (MismatchError) a task.train that does not begin with the rows of the index.
        TaskError, CheckpointError: see `build_index`.
    """
    directory = Path(path)
    rows = check_dataset(task, skip_unreadable=skip_bad_rows or bool(read_manifest(directory).skipped))
    builder = Builder(task, directory, skip_bad_rows=skip_bad_rows, **passes)
    with updating(directory, "append rows") as (current, pending):
        if any(entry.kind == "recorded" for entry in current.checkpoints):
            raise StoreError(
                f"{directory} holds a recording of the training, which knows no other rows than those trained on: "
                "build another index without the recording, or train and record anew"
            )
        last = builder.check(current if pending is None else pending, grown=True)
        if pending is not None:
            current = builder.finish(pending)
        if rows > current.task.train_rows:
            builder.finish(_begin(builder, current, last, rows))
    return refresh_searcher(directory, task, device=passes.get("device", "auto"), progress=builder.progress)


def _begin(builder: Builder, current: Manifest, last: GradientModel, rows: int) -> Manifest:
    """Commit the next generation without the new rows."""
    old = read_row_ids(builder.directory, current)
    new = np.arange(current.task.train_rows, rows)
    ids = np.concatenate([old.ids, new])
    # A task is not recognised by rows that may turn out to be bad.
    indexed = old.live_ids() if builder.skip_bad_rows else np.concatenate([old.live_ids(), new])
    manifest = successor(current, "append rows", rows=len(ids), task=task_entry(builder.task, last, indexed))
    if len(ids) < rows:
        entry = write_ids(builder.directory, f"row_ids/{manifest.generation}.ids", ids)
        manifest = manifest.model_copy(update={"row_ids": entry})
    return save_pending(builder.directory, manifest)
