"""What a CheckpointRecorder tells of a run, through the logger `gradtrace.checkpoints.recorder_notes`, once each.

Logged and not warned: where warnings are errors, a training of days must not fail for a note at its end. Without any
logging set up, Python prints these lines to standard error.
"""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger(__name__)


def note_moments(optimizer: torch.optim.Optimizer) -> None:
    """Say what an Adam run recorded without second moments cannot be asked."""
    if any("exp_avg_sq" in state for state in optimizer.state.values()):
        _log.warning(
            "%s's second moments are not kept with the checkpoints, so methods tracin-adam and source will not answer: "
            "record with CheckpointRecorder(optimizer_state=True) if they are wanted (twice the disk)",
            type(optimizer).__name__,
        )


def note_interval(steps: int, every: int) -> None:
    """Say that only the end of a run is kept."""
    _log.warning(
        "every=%d kept nothing in %d steps, so the final weights are the only checkpoint: with every=%d there are five",
        every,
        steps,
        max(1, steps // 5),
    )


def note_no_step() -> None:
    """Say that there was nothing to keep."""
    _log.warning(
        "no checkpoint is kept: recorder.step was never called; call it after each optimizer.step() of the training"
    )


def note_unfinished(saved: int | None, steps: int) -> None:
    """Say that the final weights are missing.  saved: the last step that was kept"""
    _log.warning(
        "the weights after the last step, %d, are not kept (%s): call recorder.finish() at the end of the training, or "
        "use the recorder in a `with` block",
        steps,
        "none is" if saved is None else f"those after step {saved} are the last",
    )
