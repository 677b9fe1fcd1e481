"""What a reader of a framework's checkpoints is."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradtrace.checkpoints.checkpoint import Checkpoint, Optimizer
from gradtrace.errors import CheckpointError

Group = Mapping[str, Any]  # of an optimizer's parameters, with its settings


@dataclass(frozen=True, slots=True)
class NextRate:
    """What a saved optimizer tells of the schedule, which has moved on since the step before.

    rate: the next step's;  scheduled: how often the schedule has moved on;  initial: what it began from; None: not told
    """

    rate: float
    scheduled: int | None
    initial: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """A checkpoint as one file or folder tells it. Where it knows the next step's rate alone, that is the checkpoint's
    until `with_rates_of_steps` has seen all checkpoints of the training."""

    checkpoint: Checkpoint
    next_rate: NextRate | None = None


class Reader(ABC):
    """Finds and reads the checkpoints of one framework."""

    @abstractmethod
    def find(self, directory: Path) -> list[Path]:
        """The framework's checkpoints in a directory; none where the directory is not the framework's."""

    @abstractmethod
    def read(self, path: Path) -> Reading:
        """One of them. A learning rate of zero is left to `load_checkpoints`.

        Raises:
            CheckpointError: it is damaged, or its step or learning rate are not to be found.
        """


def folders_with(directory: Path, *names: str) -> list[Path]:
    """The folders in a directory that hold files of all these names; or the directory itself, if it does."""
    folders = [path for path in [directory, *sorted(directory.iterdir())] if all((path / n).is_file() for n in names)]
    return [path for path in folders if path != directory] or folders


def main_group(path: Path, state: Any) -> Group:
    """The group with the most weights in an optimizer's state dict, as the recorder takes it."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not groups or not all("lr" in group for group in groups):
        raise CheckpointError(f"{path} holds no state of an optimizer of PyTorch; save the checkpoint again")
    found: Group = max(groups, key=lambda group: sum(_weights(state["state"].get(n, {})) for n in group["params"]))
    return found


def _weights(entry: Group) -> int:
    """How many weights a parameter has, by what the optimizer keeps of it; 1 where it keeps nothing."""
    return max((value.numel() for value in entry.values() if isinstance(value, Tensor)), default=1)


def next_rate(group: Group, scheduled: Any = None) -> NextRate:
    """From an optimizer's main group.  scheduled: `last_epoch` of the scheduler, if its state was found"""
    initial = group.get("initial_lr")
    count = scheduled if isinstance(scheduled, int) else None
    return NextRate(float(group["lr"]), count, None if initial is None else float(initial))


def described(path: Path, group: Group) -> Optimizer:
    """The optimizer, as far as the settings of its main group tell."""
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
    """Whether a group of Adam's kin is AdamW's; None where that cannot be told.

    PyTorch 2.7 and later says so. From 1.12 on, before that, Adam and AdamW have the same settings but put them in
    another order (the dicts of defaults in torch/optim/adam.py and adamw.py), and files keep it.
    """
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    if "correct_bias" in group:  # the AdamW that transformers had
        return True
    settings = list(group)
    if {"amsgrad", "maximize", "foreach"} <= set(settings):
        return settings.index("foreach") < settings.index("maximize")
    return None
