"""Messages of a CheckpointRecorder about a run, each once, in the logger `gradtrace.checkpoints.recorder_notes`.

They are logged, not warned: where warnings are errors, a message must not end a training of days. Unless logging is
configured, Python prints them to standard error.
"""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger(__name__)


def note_moments(optimizer: torch.optim.Optimizer) -> None:
    """Name the methods that a recording of Adam without second moments does not allow."""
    if any("exp_avg_sq" in state for state in optimizer.state.values()):
        _log.warning(
            "%s's second moments are not kept with the checkpoints, so methods tracin-adam and source will not answer: "
            "record with CheckpointRecorder(optimizer_state=True) if they are wanted (twice the disk)",
            type(optimizer).__name__,
        )


def note_interval(steps: int, every: int) -> None:
    """Say that the final weights are the only checkpoint."""
    _log.warning(
        "every=%d kept nothing in %d steps, so the final weights are the only checkpoint: with every=%d there are five",
        every,
        steps,
        max(1, steps // 5),
    )


def note_no_step() -> None:
    """Say that `step` was never called, so that there is no checkpoint."""
    _log.warning(
        "no checkpoint is kept: recorder.step was never called; call it after each optimizer.step() of the training"
    )


def note_unfinished(saved: int | None, steps: int) -> None:
    """Say that the final weights were not saved.  saved: the last step that was; None: none"""
    _log.warning(
        "the weights after the last step, %d, are not kept (%s): call recorder.finish() at the end of the training, or "
        "use the recorder in a `with` block",
        steps,
        "none is" if saved is None else f"those after step {saved} are the last",
    )
