"""The checkpoints in a directory: those that checkpoints.json lists, or those that a framework wrote."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.checkpoints_json import INDEX_NAME, how_to_write, listed_checkpoints
from gradtrace.checkpoints.readers import READERS, Reading
from gradtrace.checkpoints.readers.schedule import with_rates_of_steps
from gradtrace.errors import CheckpointError


def load_checkpoints(directory: str | Path) -> list[Checkpoint]:
    """The checkpoints in a directory, ordered by step. Weights are read later, by `Checkpoint.load`.

    Args:
        directory: with a checkpoints.json, or written by Hugging Face's Trainer, accelerate, Lightning or
            save_pretrained; or the path of a file in the format of checkpoints.json, such as `gradtrace select` writes.

    Raises:
        CheckpointError: the directory, its checkpoints or one of their files is missing, or checkpoints.json is
            malformed.
    """
    path = Path(directory)
    index = path if path.is_file() and path.suffix == ".json" else path / INDEX_NAME
    if index.exists():
        return sorted(listed_checkpoints(index), key=lambda checkpoint: checkpoint.step)
    if not path.is_dir():
        raise CheckpointError(f"no directory {path}; give the one that the training wrote its checkpoints to")
    for reader in READERS:
        if paths := reader.find(path):
            by_step: dict[int, Reading] = {}
            for reading in map(reader.read, paths):  # frameworks may save a step twice: as the last, as the best
                by_step.setdefault(reading.checkpoint.step, reading)
            return _without_zero_rates(with_rates_of_steps([by_step[step] for step in sorted(by_step)]))
    raise CheckpointError(f"{index} is missing; {how_to_write(path)}")


def _without_zero_rates(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints, with the rate of the previous one in place of a rate of zero, at which a schedule may end."""
    rated: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if checkpoint.learning_rate > 0:
            rated.append(checkpoint)
        elif rated:
            rate = rated[-1].learning_rate
            warnings.warn(f"{checkpoint.path}: its learning rate is zero; {rate:g} is taken instead", stacklevel=3)
            rated.append(dataclasses.replace(checkpoint, learning_rate=rate))
        else:
            raise CheckpointError(f"{checkpoint.path}: its learning rate is zero; write a checkpoints.json beside it")
    return rated
