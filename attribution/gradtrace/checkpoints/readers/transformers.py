"""Hugging Face Trainer: `checkpoint-500/` with model.safetensors, trainer_state.json and optimizer.pt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.readers.base import Reading, described, folders_with, main_group, next_rate
from gradtrace.checkpoints.readers.schedule import KnownRates
from gradtrace.checkpoints.weights import read_file
from gradtrace.errors import CheckpointError

_STATE = "trainer_state.json"


def find(directory: Path) -> list[Path]:
    return folders_with(directory, _STATE)


def read(path: Path) -> Reading:
    """Rates are logged at some steps, and the saved optimizer holds that of the next step; others are interpolated.

    Older releases of transformers log the rate of the next step. A log is from one of them if its rate for the
    checkpoint's step is the one that the optimizer has for the next step.
    """
    state = _trainer_state(path / _STATE)
    step, optimizer, initial = state["global_step"], None, None
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    if (path / "optimizer.pt").is_file():
        group = main_group(path / "optimizer.pt", read_file(path / "optimizer.pt", lazily=True))
        following, optimizer = next_rate(group), described(path, group)
        if rates.get(step) == following.rate:
            rates = {logged + 1: rate for logged, rate in rates.items()}
        rates[step + 1], initial = following.rate, following.initial
    if not rates:
        raise CheckpointError(
            f"{path} has no learning rate, neither in its log nor in an optimizer.pt; train with logging_steps at "
            "most save_steps, or write a checkpoints.json beside it"
        )
    known = KnownRates(list(rates), list(rates.values()), initial)
    rate = float(known.at(np.array([max(step, 1)]), 1)[0])
    total = float(known.at(np.arange(1, step + 1), 1).sum())
    return Reading(Checkpoint(path, step, rate, optimizer, learning_rate_sum=total))


def _trainer_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if isinstance(state["global_step"], int) and isinstance(state["log_history"], list):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is damaged: it lacks global_step or log_history; save the checkpoint again")
