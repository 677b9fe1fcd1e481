"""The checkpoints of a directory: as checkpoints.json lists them, or as a framework left them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path

from gradtrace.checkpoints.checkpoint import Checkpoint, Optimizer, load_into
from gradtrace.checkpoints.directory import INDEX_NAME, how_to_write, listed_checkpoints
from gradtrace.checkpoints.readers import READERS, Reading
from gradtrace.checkpoints.readers.schedule import with_rates_of_steps
from gradtrace.errors import CheckpointError

__all__ = ["Checkpoint", "Optimizer", "load_checkpoints", "load_into"]


def load_checkpoints(directory: str | Path) -> list[Checkpoint]:
    """The checkpoints of a directory, ordered by step. Weights are read only by `Checkpoint.load`.

    Args:
        directory: with a checkpoints.json, or as Hugging Face's Trainer, accelerate or Lightning wrote it; or the path
            of a file of checkpoints.json's form, such as `gradtrace select` writes.

    Raises:
        CheckpointError: no directory, no checkpoint in it, a malformed checkpoints.json, or a file is missing.
    """
    path = Path(directory)
    if path.is_file() and path.suffix == ".json":
        return _by_step(listed_checkpoints(path))
    if not path.is_dir():
        raise CheckpointError(f"no directory {path}; give the one that the training wrote its checkpoints to")
    if (path / INDEX_NAME).exists():
        return _by_step(listed_checkpoints(path / INDEX_NAME))
    for reader in READERS:
        if found := reader.find(path):
            return _with_rates(with_rates_of_steps(_without_repeats(map(reader.read, found))))
    raise CheckpointError(f"{path / INDEX_NAME} is missing; {how_to_write(path)}")


def _by_step(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def _without_repeats(readings: Iterable[Reading]) -> list[Reading]:
    """Frameworks save a step twice (as the last, as the best): the first found of each step, ordered by step."""
    found: dict[int, Reading] = {}
    for reading in readings:
        found.setdefault(reading.checkpoint.step, reading)
    return [found[step] for step in sorted(found)]


def _with_rates(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """A schedule may end at zero: the rate of the checkpoint before then stands for it, as in the recorder."""
    found: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if checkpoint.learning_rate > 0:
            found.append(checkpoint)
        elif found:
            rate = found[-1].learning_rate
            warnings.warn(f"{checkpoint.path}: its learning rate is zero; {rate:g} is taken instead", stacklevel=3)
            found.append(dataclasses.replace(checkpoint, learning_rate=rate))
        else:
            raise CheckpointError(f"{checkpoint.path}: its learning rate is zero; write a checkpoints.json beside it")
    return found
