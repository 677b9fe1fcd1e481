"""What a reader of a framework's checkpoints is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradtrace.checkpoint import Checkpoint, Optimizer
from gradtrace.errors import CheckpointError

Group = Mapping[str, Any]  # of an optimizer's parameters, with its settings


class Reader(ABC):
    """Finds and reads the checkpoints of one framework."""

    @abstractmethod
    def find(self, directory: Path) -> list[Path]:
        """The framework's checkpoints in a directory; none where the directory is not the framework's."""

    @abstractmethod
    def read(self, path: Path) -> Checkpoint:
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


def described(group: Group) -> Optimizer:
    """The optimizer, as far as the settings of its main group tell."""
    name = ("adamw" if group.get("decoupled_weight_decay", True) else "adam") if "betas" in group else "sgd"
    return Optimizer(name, float(group.get("momentum", 0.0)), float(group.get("weight_decay", 0.0)))
