"""Append the training rows that a data set has grown by."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradtrace.data.guards import check_dataset
from gradtrace.errors import StoreError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import Manifest, read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.generations import save_pending, successor, updating
from gradtrace_indexer.searchers.build import refresh_searcher
from gradtrace_indexer.writing.files import write_ids


def append_rows(
    path: str | Path,
    task: Task,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    skip_bad_rows: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Index the rows that task.train has beyond those of the index, publish them as one generation, and open it.

    They are given the next ids, their own numbers in task.train; their segment has shards of its own. With no new row
    the index is opened as it is. What an interrupted call began is finished first.

    num_workers, skip_bad_rows: as in `build_index`

    Raises:
        StoreError: no index, or one with a recording of its training; another update unfinished or running, a full
            disk; or (MismatchError) a task.train that does not begin with the rows of the index.
        TaskError, CheckpointError: see `build_index`.
    """
    directory = Path(path)
    rows = check_dataset(task, skip_unreadable=skip_bad_rows or bool(read_manifest(directory).skipped))
    builder = Builder(task, directory, device, batch_size, progress, None, num_workers, skip_bad_rows)
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
            builder.finish(_begun(builder, current, last, rows))
    return refresh_searcher(directory, task, device=device, progress=progress)


def _begun(builder: Builder, current: Manifest, last: GradientModel, rows: int) -> Manifest:
    """Commit the next generation without the new rows."""
    old = read_row_ids(builder.directory, current)
    new = np.arange(current.task.train_rows, rows)
    ids = np.concatenate([old.ids, new])
    # New rows may turn out to be bad: then the task is recognised by the old ones.
    indexed = old.live_ids() if builder.skip_bad_rows else np.concatenate([old.live_ids(), new])
    begun = successor(current, "append rows", rows=len(ids), task=task_entry(builder.task, last, indexed))
    if len(ids) < rows:
        begun = begun.model_copy(
            update={"row_ids": write_ids(builder.directory, f"row_ids/{begun.generation}.ids", ids)}
        )
    return save_pending(builder.directory, begun)
