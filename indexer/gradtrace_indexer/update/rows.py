"""Append the training rows that a data set has grown by, or delete rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from typing_extensions import Unpack

from gradtrace.data.guards import check_dataset
from gradtrace.errors import QueryError, StoreError
from gradtrace.fingerprint import task_entry, without_probes
from gradtrace.index import Index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.opening import open_index
from gradtrace.store.manifest import Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import Ids, RowIds, read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build.builder import Builder, PassOptions, WorkOptions
from gradtrace_indexer.build.completion import complete
from gradtrace_indexer.build.taking_part import run_shared
from gradtrace_indexer.generations import publish, save_pending, successor, updating
from gradtrace_indexer.searchers import refresh_searcher
from gradtrace_indexer.writing.files import write_ids


def append_rows(path: str | Path, task: Task, *, skip_bad_rows: bool = False, **passes: Unpack[WorkOptions]) -> Index:
    """Index the rows that task.train has beyond those of the index, publish them as one generation, and open it.

    Their ids are their numbers in task.train; they get shards of their own. Without new rows the index is opened as it
    is. What an interrupted call began is finished first.

    Args:
        skip_bad_rows: as in `build_index`.
        passes: see `WorkOptions`.

    Raises:
        StoreError: no index, or one with a recording of its training; another update unfinished or running, a full
            disk; or (MismatchError) a task.train that does not begin with the rows of the index.
        TaskError, CheckpointError: see `build_index`.
    """
    directory = Path(path)
    check_dataset(task, skip_unreadable=skip_bad_rows or bool(read_manifest(directory).skipped))
    appended = run_shared(
        task, directory, passes, partial(append_alone, directory=directory, skip_bad_rows=skip_bad_rows)
    )
    return appended or open_index(directory, task, device=passes.get("device", "auto"))


def append_alone(task: Task, passes: PassOptions, *, directory: Path, skip_bad_rows: bool) -> Index:
    builder, rows = Builder(task, directory, skip_bad_rows=skip_bad_rows, **passes), len(task.train)
    with updating(directory, "append rows") as (current, pending):
        if any(entry.kind == "recorded" for entry in current.checkpoints):
            raise StoreError(
                f"{directory} holds a recording of the training, which knows no other rows than those trained on: "
                "build another index without the recording, or train and record anew"
            )
        last = builder.check(current if pending is None else pending, grown=True)
        if pending is not None:
            current = complete(builder, pending)
        if rows > current.task.train_rows:
            complete(builder, _begin(builder, current, last, rows))
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


def delete_rows(path: str | Path, rows: Sequence[int]) -> Manifest:
    """Publish a generation without these rows, whose space `compact` reclaims. They may include deleted ones.
    Returns the current manifest.

    The other rows keep their ids, so task.train must keep its length: leave the deleted examples in, or put others in
    their place.

    Raises:
        QueryError: a row that the index never had, or no row would be left.
        StoreError: no index, an update unfinished or running, or a full disk.
    """
    directory = Path(path)
    with updating(directory, "delete rows") as (current, _):
        ids = read_row_ids(directory, current)
        deleted = np.union1d(ids.deleted, np.intersect1d(_checked(rows, ids), ids.ids))
        if len(deleted) == len(ids.deleted):
            return current
        if len(deleted) == len(ids.ids):
            raise QueryError(f"no row of {directory} would be left; remove the directory if that is meant")
        after = successor(current, "delete rows")
        entry = write_ids(directory, f"deleted/{after.generation}.ids", deleted)
        task = without_probes(current.task, deleted.tolist())
        return publish(directory, after.model_copy(update={"deleted": entry, "task": task}))


def _checked(rows: Sequence[int], ids: RowIds) -> Ids:
    numbers = np.asarray(list(rows) or np.zeros(0, dtype=np.int64))
    if not np.issubdtype(numbers.dtype, np.integer):
        raise QueryError(f"rows are row numbers, not {numbers.dtype} values")
    unknown = numbers[(numbers < 0) | (numbers >= ids.rows)]
    if len(unknown):
        raise QueryError(f"there is no row {unknown[0]} to delete; rows of this index are 0 to {ids.rows - 1}")
    return numbers.astype(np.int64)
