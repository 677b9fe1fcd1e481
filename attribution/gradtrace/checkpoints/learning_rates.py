"""Sums of the learning rate over the steps between the checkpoints of a training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.checkpoints_json import FileEntry
from gradtrace.store.manifest import CheckpointEntry, by_run, weights_positions

Rated = Checkpoint | CheckpointEntry | FileEntry


def stretch_sums(run: Sequence[Rated]) -> NDArray[np.float64]:
    """The sum of the learning rates of all steps since the previous checkpoint, or since step 0 for the first.

    float64 [len(run)].  run: checkpoints of one training, in order of their steps

    If `learning_rate_sum` is unknown, the checkpoint's rate is taken for all of these steps. If checkpoints are left
    out of `run`, the steps before them count for the next checkpoint.
    """
    steps, totals = [0], [0.0]
    for checkpoint in run:
        total = checkpoint.learning_rate_sum
        if total is None:
            total = totals[-1] + checkpoint.learning_rate * (checkpoint.step - steps[-1])
        steps.append(checkpoint.step)
        totals.append(max(total, totals[-1]))
    return np.diff(totals)


def warn_of_guessed_sums(entries: Sequence[CheckpointEntry]) -> None:
    """Warn, once for all runs of an index, if step-weighted methods have to guess the rates between checkpoints."""
    for positions in by_run(entries, weights_positions(entries)):
        run = [entries[position] for position in positions]
        guessed = [str(entry.step) for entry in run if entry.learning_rate_sum is None]
        if guessed and len({entry.learning_rate for entry in run}) > 1:
            steps = ", ".join(guessed[:3]) + (" ..." if len(guessed) > 3 else "")
            warnings.warn(
                "the learning rate changes in this training, and how it went between the checkpoints was not kept for "
                f"steps {steps}: source, fast-source and weights='learning_rate_steps' take the rate at a checkpoint "
                "for that of all steps since the one before; record with CheckpointRecorder, or give learning_rate_sum "
                "in checkpoints.json (docs/checkpoints.md)",
                stacklevel=3,
            )
            return
