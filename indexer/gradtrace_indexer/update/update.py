"""Bring an index up to date with its task and its training run: appended rows, then new checkpoints."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import Unpack

from gradtrace.checkpoints import load_checkpoints
from gradtrace.data.guards import check_dataset
from gradtrace.index import Index
from gradtrace.store.manifest import Manifest, read_manifest, trained_models
from gradtrace.task import Task
from gradtrace_indexer.build.builder import PassOptions
from gradtrace_indexer.generations import discard, read_pending
from gradtrace_indexer.update.add_checkpoints import add_checkpoints, run_number, still_to_come
from gradtrace_indexer.update.append import append_rows


def update_index(
    path: str | Path,
    task: Task,
    checkpoints: str | Path | None = None,
    *,
    run: int | None = None,
    **passes: Unpack[PassOptions],
) -> Index:
    """Index the rows that task.train has grown by, and the checkpoints that the training run wrote since.

    What an interrupted call began is finished first.

    Args:
        checkpoints: directory of the training run; None: where the weights of its last checkpoint in the index lie.
        run: of several in the index, the number of the one that was continued; None: the last.
        passes: see `PassOptions`.

    Raises:
        as `append_rows` and `add_checkpoints`.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    written = load_checkpoints(checkpoints or run_directory(directory, manifest, run))  # a wrong path changes nothing
    grown = check_dataset(task, skip_unreadable=bool(manifest.skipped)) > manifest.task.train_rows
    pending = read_pending(directory)
    if grown and pending is not None and pending.made_by == "add checkpoints":
        discard(directory)  # it lacks the new rows, and these must come first: checkpoints are added to all rows
    if grown or (pending is not None and pending.made_by == "append rows"):
        append_rows(directory, task, **passes)
    new = still_to_come(written, read_manifest(directory), run)
    return add_checkpoints(directory, task, new, run=run, **passes)


def run_directory(directory: Path, manifest: Manifest, run: int | None) -> Path:
    """Where the weights of a training run's last checkpoint lie, and with them those of the others."""
    last = manifest.checkpoints[trained_models(manifest.checkpoints)[run_number(manifest, run)]]
    return (directory.resolve() / last.file).parent
