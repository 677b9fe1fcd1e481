"""accelerate's `save_state`: folders with model.safetensors, optimizer.bin and scheduler.bin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.readers.base import Reading, described, folders_with, main_group, next_rate
from gradtrace.checkpoints.weights import read_file
from gradtrace.errors import CheckpointError

_OPTIMIZER = "optimizer.bin"


def find(directory: Path) -> list[Path]:
    return folders_with(directory, _OPTIMIZER)


def read(path: Path) -> Reading:
    """The saved optimizer holds the rate of the next step. The step is counted by the optimizer, the folder's name, or
    the scheduler."""
    if (path / "optimizer_1.bin").exists() or (path / "model_1.safetensors").exists():
        raise CheckpointError(
            f"{path} holds several models or optimizers; write a checkpoints.json that names the one to attribute"
        )
    state = read_file(path / _OPTIMIZER, lazily=True)
    group = main_group(path / _OPTIMIZER, state)
    scheduler = path / "scheduler.bin"
    scheduled = read_file(scheduler).get("last_epoch") if scheduler.is_file() else None
    step = _step(path, state, scheduled)
    return Reading(Checkpoint(path, step, float(group["lr"]), described(path, group)), next_rate(group, scheduled))


def _step(path: Path, optimizer: Mapping[str, Any], scheduled: Any) -> int:
    counts = [int(entry["step"]) for entry in optimizer["state"].values() if "step" in entry]
    if counts:
        return max(counts)
    named = re.fullmatch(r"step_(\d+)", path.name)
    if named:
        return int(named[1])
    if isinstance(scheduled, int):
        return scheduled
    raise CheckpointError(
        f"{path} does not tell its step: the optimizer counts no steps and there is no scheduler; name the folder "
        "step_NUMBER, or write a checkpoints.json beside it"
    )
