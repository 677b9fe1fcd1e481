"""Keeping checkpoints while a model trains."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradtrace.checkpoint_index import INDEX_NAME, CheckpointIndex, FileEntry, OptimizerEntry, read_index
from gradtrace.errors import CheckpointError

_TEMPORARY = ".tmp"


class CheckpointRecorder:
    """Saves a model's weights every so many optimizer steps, with what attribution needs to know about each.

        recorder = CheckpointRecorder("runs/1/checkpoints", every=500, batch_size=64)
        for inputs, labels in loader:
            ...
            optimizer.step()
            recorder.step(model, optimizer)   # before scheduler.step(), so that the rate read is the rate used
            scheduler.step()
        recorder.save(model)                  # the final weights, unless the last step saved them already

    Files are written under a temporary name, synced and renamed, then `checkpoints.json` likewise: killed at any
    moment, the directory holds every checkpoint that was finished. With `resume=True` the recorder goes on after the
    last checkpoint of its directory; set `steps` where training resumes from another step. Without it, a directory
    that has checkpoints is refused: those of two trainings must not mix. In distributed training, call the recorder in
    one process only.
    """

    def __init__(
        self, directory: str | Path, *, every: int, batch_size: int | None = None, resume: bool = False
    ) -> None:
        if every < 1:
            raise CheckpointError(f"every={every}: give the number of optimizer steps between checkpoints, 1 or more")
        self.directory = Path(directory)
        self.every = every
        self.directory.mkdir(parents=True, exist_ok=True)
        known = (self.directory / INDEX_NAME).exists()
        if known and not resume:
            raise CheckpointError(
                f"{self.directory} has the checkpoints of a training already; give another directory or delete it, or "
                "pass resume=True where this training goes on from the last of them"
            )
        for leftover in self.directory.glob(f"step-*{_TEMPORARY}"):
            leftover.unlink()
        self._index = read_index(self.directory / INDEX_NAME) if known else CheckpointIndex()
        self._index.batch_size = batch_size or self._index.batch_size
        self.steps = max((entry.step for entry in self._index.checkpoints), default=0)
        self._learning_rate: float | None = None
        self._saved: int | None = None

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Count one optimizer step, and save the model's weights if its turn has come."""
        group = _main_group(optimizer, warn=self._learning_rate is None)
        # A schedule may end at zero: the last rate above it then stands for the stretch that the checkpoint closes.
        if 0 < float(group["lr"]) < math.inf:
            self._learning_rate = float(group["lr"])
        self._index.optimizer = _describe(optimizer, group)
        self.steps += 1
        if self.steps % self.every == 0:
            self.save(model)

    def save(self, model: nn.Module) -> None:
        """Save the weights as they are after the latest step; does nothing where that step is saved already.

        Raises:
            CheckpointError: `step` has not been called yet, or the learning rate has been zero ever since.
        """
        if self._learning_rate is None:
            raise CheckpointError(
                "no step with a learning rate above zero has been recorded; call recorder.step(model, optimizer) after "
                "each optimizer.step() and before scheduler.step()"
            )
        file = f"step-{self.steps:09d}.safetensors"
        if self._saved == self.steps:
            return
        path = self.directory / file
        temporary = path.with_name(path.name + _TEMPORARY)
        save_file(_tensors(model), temporary)
        _commit(temporary, path)
        kept = [entry for entry in self._index.checkpoints if entry.step != self.steps]
        entry = FileEntry(file=file, step=self.steps, learning_rate=self._learning_rate)
        self._index.checkpoints = sorted([*kept, entry], key=lambda entry: entry.step)
        self._write_index()
        self._saved = self.steps

    def _write_index(self) -> None:
        path = self.directory / INDEX_NAME
        temporary = path.with_name(path.name + _TEMPORARY)
        temporary.write_text(self._index.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")
        _commit(temporary, path)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous tensors that share no memory."""
    state = model.state_dict()
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _commit(temporary: Path, path: Path) -> None:
    """Give a written file its final name once its bytes, and then the name itself, are on disk."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _main_group(optimizer: torch.optim.Optimizer, warn: bool) -> dict[str, Any]:
    """The parameter group with the most weights: a checkpoint has room for one learning rate."""
    groups = optimizer.param_groups
    main = max(groups, key=lambda group: sum(weight.numel() for weight in group["params"]))
    if warn and len({float(group["lr"]) for group in groups}) > 1:
        warnings.warn(
            f"the optimizer's parameter groups have different learning rates; {float(main['lr']):g} is recorded, that "
            "of the group with the most weights, and TracIn will weigh the others' gradients by it too",
            stacklevel=3,
        )
    return main


def _describe(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> OptimizerEntry:
    return OptimizerEntry(
        name=type(optimizer).__name__.lower(),
        momentum=float(group.get("momentum", 0.0)),
        weight_decay=float(group.get("weight_decay", 0.0)),
    )
