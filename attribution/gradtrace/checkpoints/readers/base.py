"""What a reader of a framework's checkpoints is, and reading a saved optimizer's settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.errors import CheckpointError
from gradtrace.store.manifest import Optimizer

Group = Mapping[str, Any]  # a parameter group of an optimizer, with its settings


@dataclass(frozen=True, slots=True)
class NextRate:
    """The learning rate in a saved optimizer, which is that of the next step: the scheduler has stepped already.

    rate: of the next step
    scheduled: number of scheduler steps so far; None: unknown
    initial: the rate at the start of the schedule; None: unknown
    """

    rate: float
    scheduled: int | None
    initial: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """A checkpoint as read from one file or folder.

    If only the rate of the next step is known, the checkpoint has that one, until `with_rates_of_steps` replaces it
    with all checkpoints of the training at hand.
    """

    checkpoint: Checkpoint
    next_rate: NextRate | None = None


class Reader(NamedTuple):
    """Finds and reads the checkpoints of one framework.

    find: paths of the framework's checkpoints in a directory; an empty list if the framework did not write it
    read: reads one of these checkpoints, whose learning rate may be zero, which `load_checkpoints` replaces. Raises
        CheckpointError if it is damaged, or does not tell its step or its learning rate.
    """

    find: Callable[[Path], list[Path]]
    read: Callable[[Path], Reading]


def folders_with(directory: Path, *names: str) -> list[Path]:
    """The folders in a directory that hold files of all these names; if there are none, the directory if it does."""
    folders = [path for path in [directory, *sorted(directory.iterdir())] if all((path / n).is_file() for n in names)]
    return [path for path in folders if path != directory] or folders


def main_group(path: Path, state: Any) -> Group:
    """The parameter group with the most weights in an optimizer's state dict, as in the recorder."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not groups or not all("lr" in group for group in groups):
        raise CheckpointError(f"{path} is not a PyTorch optimizer's state dict; save the checkpoint again")
    largest: Group = max(groups, key=lambda group: sum(_weights(state["state"].get(n, {})) for n in group["params"]))
    return largest


def _weights(entry: Group) -> int:
    """Number of weights of a parameter, from the optimizer's state of it; 1 if it has none."""
    return max((value.numel() for value in entry.values() if isinstance(value, Tensor)), default=1)


def next_rate(group: Group, scheduled: Any = None) -> NextRate:
    """The rate in an optimizer's main group.  scheduled: `last_epoch` of the scheduler, if its state was saved"""
    initial = group.get("initial_lr")
    count = scheduled if isinstance(scheduled, int) else None
    return NextRate(float(group["lr"]), count, None if initial is None else float(initial))


def described(path: Path, group: Group) -> Optimizer:
    """The optimizer, from the settings of its main group. Warns if Adam and AdamW cannot be told apart."""
    momentum, weight_decay = float(group.get("momentum", 0.0)), float(group.get("weight_decay", 0.0))
    if "betas" not in group:
        return Optimizer("sgd", momentum, weight_decay)
    decoupled = _decouples_decay(group)
    if decoupled is None and weight_decay:
        warnings.warn(
            f"{path} does not tell whether Adam's weight decay of {weight_decay:g} was part of the loss (Adam) or "
            'beside it (AdamW); AdamW is taken: if that is wrong, write a checkpoints.json that names "adam"',
            stacklevel=2,
        )
    return Optimizer("adam" if decoupled is False else "adamw", momentum, weight_decay)


def _decouples_decay(group: Group) -> bool | None:
    """Whether a group of Adam or AdamW is AdamW's; None if that cannot be told.

    PyTorch 2.7 and later saves it. In 1.12 to 2.6, Adam and AdamW have the same settings in different orders (the dicts
    of defaults in torch/optim/adam.py and adamw.py), which files preserve.
    """
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    if "correct_bias" in group:  # the AdamW of older releases of transformers
        return True
    settings = list(group)
    if {"amsgrad", "maximize", "foreach"} <= set(settings):
        return settings.index("foreach") < settings.index("maximize")
    return None
