"""Lightning: `.ckpt` files of a ModelCheckpoint."""

from __future__ import annotations

from pathlib import Path

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.checkpoints_json import how_to_write
from gradtrace.checkpoints.readers.base import Reading, described, main_group, next_rate
from gradtrace.checkpoints.weights import read_file
from gradtrace.errors import CheckpointError


def find(directory: Path) -> list[Path]:
    """As in `Reader`, with last.ckpt at the end, since it repeats another checkpoint."""
    return sorted(directory.glob("*.ckpt"), key=lambda path: (path.stem.startswith("last"), path.name))


def read(path: Path) -> Reading:
    """The saved optimizer holds the rate of the next step, since the scheduler has stepped already."""
    try:
        content = read_file(path, lazily=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} In Lightning, hyperparameters are saved beside the weights: leave objects out of them "
            "(self.save_hyperparameters(ignore=[...])), or use gradtrace.integrations.lightning.RecorderCallback"
        ) from None
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise CheckpointError(f"{path} is not Lightning's; {how_to_write(path.parent)}")
    states = content.get("optimizer_states") or []
    if len(states) != 1:
        raise CheckpointError(
            f"{path} holds the state of {len(states)} optimizers, so that its learning rate is not known: save "
            f"with save_weights_only=False; otherwise, {how_to_write(path.parent)}"
        )
    group = main_group(path, states[0])
    checkpoint = Checkpoint(path, content["global_step"], float(group["lr"]), described(path, group))
    schedules = content.get("lr_schedulers") or []
    return Reading(checkpoint, next_rate(group, schedules[0].get("last_epoch") if len(schedules) == 1 else None))
