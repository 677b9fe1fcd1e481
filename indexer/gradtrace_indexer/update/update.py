"""Bring an index up to date with its task and its training run: appended rows, then new checkpoints. Or follow the
run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

from typing_extensions import Unpack

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.indexed import entry_name
from gradtrace.checkpoints.weights import weight_files
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError
from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.store.manifest import Manifest, trained_models
from gradtrace.store.manifest_file import read_manifest
from gradtrace.task import Task
from gradtrace_indexer.build.build import check_order
from gradtrace_indexer.build.builder import PassOptions, WorkOptions
from gradtrace_indexer.build.taking_part import run_shared
from gradtrace_indexer.generations import discard, read_pending
from gradtrace_indexer.update.add_checkpoints import add_alone, add_checkpoints, run_number, still_to_come
from gradtrace_indexer.update.rows import append_alone

INTERVAL = 10.0  # seconds between two looks

_State = list[tuple[str, int, int]]  # name, size and time of change of each weight file


def update_index(
    path: str | Path,
    task: Task,
    checkpoints: str | Path | None = None,
    *,
    run: int | None = None,
    **passes: Unpack[WorkOptions],
) -> Index:
    """Index the rows that task.train has grown by, and the checkpoints that the training run wrote since.

    What an interrupted call began is finished first.

    Args:
        checkpoints: directory of the training run; None: where the weights of its last checkpoint in the index lie.
        run: of several in the index, the number of the one that was continued; None: the last.
        passes: see `WorkOptions`.

    Raises as `append_rows` and `add_checkpoints`.
    """
    directory = Path(path)
    read_manifest(directory)  # refuses a directory without an index before anything is created in it
    update = partial(_updated, directory=directory, checkpoints=checkpoints, run=run)
    updated = run_shared(task, directory, passes, update)
    return updated or open_index(directory, task, device=passes.get("device", "auto"))


def _updated(
    task: Task, passes: PassOptions, *, directory: Path, checkpoints: str | Path | None, run: int | None
) -> Index:
    manifest = read_manifest(directory)
    written = load_checkpoints(checkpoints or run_directory(directory, manifest, run))  # a wrong path changes nothing
    grown = check_dataset(task, skip_unreadable=bool(manifest.skipped)) > manifest.task.train_rows
    pending = read_pending(directory)
    if grown and pending is not None and pending.made_by == "add checkpoints":
        discard(directory)  # it lacks the new rows, and these must come first: checkpoints are added to all rows
    if grown or (pending is not None and pending.made_by == "append rows"):
        append_alone(task, passes, directory=directory, skip_bad_rows=False)
    new = still_to_come(written, read_manifest(directory), run)
    check_order(new)
    return add_alone(task, passes, directory=directory, checkpoints=new, run=run)


def run_directory(directory: Path, manifest: Manifest, run: int | None) -> Path:
    """Where the weights of a training run's last checkpoint lie, and with them those of the others."""
    last = manifest.checkpoints[trained_models(manifest.checkpoints)[run_number(manifest, run)]]
    return (directory.resolve() / last.file).parent


def watch(
    path: str | Path,
    task: Task,
    checkpoints: str | Path,
    *,
    run: int | None = None,
    interval: float = INTERVAL,
    on_wait: Callable[[CheckpointError], object] = lambda error: None,
    **passes: Unpack[WorkOptions],
) -> Iterator[Index]:
    """Look into a checkpoint directory every `interval` seconds; yields the updated index whenever there were new
    checkpoints.

    A checkpoint is added once its files were the same at two looks, so that none is read while it is written, and after
    all earlier ones. Where the directory or a file in it cannot be read yet, `on_wait` gets the error, and the next
    look tries again.  run: of several in the index, the number of this one; None: the last

    Raises as `add_checkpoints`, but for CheckpointError.
    """
    directory = Path(path)
    seen: dict[str, _State] = {}
    while True:
        try:
            manifest = read_manifest(directory)
            number = run_number(manifest, run)
            written = still_to_come(load_checkpoints(checkpoints), manifest, number)
            states = {checkpoint.name: _state(checkpoint) for checkpoint in written}
            settled = _settled(written, seen, states)
            seen = states
            indexed = {entry.name for entry in manifest.checkpoints}
            new = {entry_name(checkpoint, number) for checkpoint in settled} - indexed
            if new or (settled and manifest.searcher_is_stale()):
                yield add_checkpoints(directory, task, settled, run=number, **passes)
        except CheckpointError as error:
            on_wait(error)
        time.sleep(interval)


def _settled(written: list[Checkpoint], before: dict[str, _State], now: dict[str, _State]) -> list[Checkpoint]:
    """Those before the first that changed: an earlier checkpoint cannot be added after a later one."""
    return list(takewhile(lambda checkpoint: before.get(checkpoint.name) == now[checkpoint.name], written))


def _state(checkpoint: Checkpoint) -> _State:
    try:
        stats = [(file.name, file.stat()) for file in weight_files(checkpoint.path)]
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read ({error.strerror}); restore the file") from None
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
