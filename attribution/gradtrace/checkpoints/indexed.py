"""The checkpoints that an index was built from: their entries in the manifest, and where their weights are now."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.errors import CheckpointError, MismatchError
from gradtrace.store.manifest import CheckpointEntry
from gradtrace.store.regular_files import regular_path
from gradtrace.task import Task

Directory = str | Path


def entry_name(checkpoint: Checkpoint, run: int) -> str:
    """A checkpoint's name in an index: its file's name, which checkpoints of other training runs may have, too."""
    return f"run-{run}/{checkpoint.name}" if run else checkpoint.name


def checkpoint_entries(
    directory: Path, checkpoints: Sequence[Checkpoint], task: Task, run: int = 0
) -> list[CheckpointEntry]:
    """The entries of a training run's checkpoints in the manifest of the index at `directory`."""
    return [
        CheckpointEntry(
            name=entry_name(checkpoint, run),
            file=os.path.relpath(checkpoint.path.parent.resolve(), directory.resolve()) + f"/{checkpoint.name}",
            step=checkpoint.step,
            learning_rate=checkpoint.learning_rate,
            learning_rate_sum=checkpoint.learning_rate_sum,
            sha256=checkpoint.sha256(),
            moments_sha256=checkpoint.moments_sha256(),
            optimizer=checkpoint.optimizer,
            batch_size=checkpoint.batch_size,
            run=run,
            kind=checkpoint.kind,
            second_moments=has_usable_moments(checkpoint, task),
        )
        for checkpoint in checkpoints
    ]


def has_usable_moments(checkpoint: Checkpoint, task: Task) -> bool:
    """Whether an index takes second moments from a checkpoint. Warns and returns False if it is not certain which
    parameters they belong to."""
    if checkpoint.optimizer is not None and checkpoint.optimizer.name == "sgd":
        return False
    try:
        return checkpoint.keeps_second_moments(task.model())
    except CheckpointError as error:
        warnings.warn(f"{error}. The index is built without them", stacklevel=2)
        return False


def directories_of_runs(checkpoints: Directory | Sequence[Directory] | None, runs: int) -> Sequence[Directory | None]:
    """The directory to which the weights of each training run were moved; None: they were not moved.

    checkpoints: one directory for each run, or the only one

    Raises:
        CheckpointError: there is not one directory for each run.
    """
    if checkpoints is None:
        return [None] * runs
    directories = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    if len(directories) != runs:
        raise CheckpointError(
            f"{len(directories)} directories of checkpoints were given for an index of {runs} training run(s): give "
            "one for each, or none if the weights are where they were"
        )
    return directories


def indexed_checkpoint(directory: Path, entry: CheckpointEntry, moved_to: str | Path | None = None) -> Checkpoint:
    """The checkpoint of an entry in the manifest of the index at `directory`.

    moved_to: the directory to which the weights were moved

    Raises:
        CheckpointError: the weights are missing.
        CorruptIndexError: the file of an average is not one in the index.
        MismatchError: the weights are not those that were indexed.
    """
    if moved_to is None or entry.kind == "average":  # averages are inside the index
        inside = directory.resolve()
        path = regular_path(inside, entry.file) if entry.kind == "average" else inside / entry.file
    else:
        path = Path(moved_to) / Path(entry.file).name
    if not path.exists():
        raise CheckpointError(
            f"the weights of checkpoint {entry.name} are not at {path}: restore the file, or name the directory that "
            "it was moved to (checkpoints=...)"
        )
    checkpoint = Checkpoint(path, entry.step, entry.learning_rate, learning_rate_sum=entry.learning_rate_sum)
    if checkpoint.sha256() != entry.sha256:
        raise MismatchError(
            f"{path} is not the checkpoint {entry.name} that was indexed (its SHA-256 differs): restore that file or "
            "rebuild the index"
        )
    return checkpoint
