"""A directory of save_pretrained: one model of transformers or adapter of PEFT, without a word on its training."""

from __future__ import annotations

from pathlib import Path

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.readers.base import Reading
from gradtrace.checkpoints.weights import weight_files
from gradtrace.errors import CheckpointError

_CONFIGS = ("config.json", "adapter_config.json")


def find(directory: Path) -> list[Path]:
    try:
        weight_files(directory)
    except CheckpointError:
        return []
    return [directory] if any((directory / name).is_file() for name in _CONFIGS) else []


def read(path: Path) -> Reading:
    """Step and learning rate are not known. With a rate of one, `tracin` is the inner product of the gradients."""
    return Reading(Checkpoint(path, 0, 1.0))
