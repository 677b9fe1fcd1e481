"""Follow a training run: add its checkpoints to an index as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.weights import weight_files
from gradtrace.errors import CheckpointError
from gradtrace.index import Index
from gradtrace.store.manifest import read_manifest
from gradtrace.task import Task
from gradtrace_indexer.build.builder import entry_name
from gradtrace_indexer.update.add_checkpoints import add_checkpoints, run_number, still_to_come

INTERVAL = 10.0  # seconds between two looks

_State = list[tuple[str, int, int]]  # name, size and time of change of each weight file


def watch(
    path: str | Path,
    task: Task,
    checkpoints: str | Path,
    *,
    run: int | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str = "auto",
    interval: float = INTERVAL,
    on_wait: Callable[[CheckpointError], object] = lambda error: None,
) -> Iterator[Index]:
    """Look into a checkpoint directory every `interval` seconds, for as long as the iterator is drawn from; gives the
    updated index after each look that found new checkpoints.

    Weights are taken in order, once their file stayed as it was from one look to the next, so that none is read while
    it is written. Where the directory or a file of it cannot be read yet, `on_wait` is told, and the next look tries
    again.  run: of several in the index, the number of this one; None: the last

    Raises:
        as `add_checkpoints`, but CheckpointError.
    """
    directory = Path(path)
    seen: dict[str, _State] = {}
    while True:
        try:
            manifest = read_manifest(directory)
            number = run_number(manifest, run)
            found = still_to_come(load_checkpoints(checkpoints), manifest, number)
            states = {checkpoint.name: _state(checkpoint) for checkpoint in found}
            settled = _settled(found, seen, states)
            seen = states
            indexed = {entry.name for entry in manifest.checkpoints}
            new = {entry_name(checkpoint, number) for checkpoint in settled} - indexed
            if new or (settled and manifest.searcher_is_stale()):
                how: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
                yield add_checkpoints(directory, task, settled, run=number, **how)
        except CheckpointError as error:
            on_wait(error)
        time.sleep(interval)


def _settled(found: list[Checkpoint], before: dict[str, _State], now: dict[str, _State]) -> list[Checkpoint]:
    """Those before the first that changed: an earlier checkpoint cannot be added after a later one."""
    return list(takewhile(lambda checkpoint: before.get(checkpoint.name) == now[checkpoint.name], found))


def _state(checkpoint: Checkpoint) -> _State:
    try:
        found = [(file.name, file.stat()) for file in weight_files(checkpoint.path)]
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read ({error.strerror}); restore the file") from None
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
