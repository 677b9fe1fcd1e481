"""checkpoints.json, the list of a training's checkpoints: its schema, and reading it.

The file is in the directory of the weights (`.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` by `torch.save`):

    {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
     "batch_size": 64,
     "checkpoints": [{"file": "a.pt", "step": 188, "learning_rate": 0.03, "learning_rate_sum": 5.64},
                     {"file": "b.pt", "step": 376, "learning_rate": 0.01, "learning_rate_sum": 9.42}]}

`optimizer`, `batch_size` and `learning_rate_sum` may be left out. `file` MUST be relative and stay inside the
directory; its last component is the checkpoint's name and MUST be unique. It may be a directory of weights as Hugging
Face's libraries write it. `step` is the number of optimizer steps before the weights were saved and MUST be unique.
`learning_rate` is the rate of that step and MUST be above zero; if a schedule ended at zero, it is the last rate above
zero. `learning_rate_sum` is the sum of the rates of steps 1 to `step`, and MUST NOT decrease from a step to a later
one. The list may be in any order.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.weights import SUFFIXES
from gradtrace.errors import CheckpointError
from gradtrace.store.manifest import Optimizer

INDEX_NAME = "checkpoints.json"


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: str
    step: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[FiniteFloat, Field(gt=0)]
    learning_rate_sum: Annotated[FiniteFloat, Field(ge=0)] | None = None


class CheckpointIndex(BaseModel):
    """checkpoints.json."""

    model_config = ConfigDict(extra="forbid")

    optimizer: Optimizer | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    checkpoints: list[FileEntry] = []

    def content(self) -> str:
        """The text of the file."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def read_index(path: Path) -> CheckpointIndex:
    """Read and validate a checkpoints.json, without the files that it names.

    Raises:
        CheckpointError: it is missing or malformed, repeats a step or a file name, names a file outside the directory,
            or has a `learning_rate_sum` that decreases.
    """
    try:
        index = CheckpointIndex.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except ValidationError as error:
        problems = "\n".join(f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path} is malformed; correct it:\n{problems}") from None
    for entry in index.checkpoints:
        _check_file_name(path, entry.file)
    _check_unique(path, "step", [entry.step for entry in index.checkpoints])
    _check_unique(path, "file name", [PurePosixPath(entry.file).name for entry in index.checkpoints])
    _check_sums(path, index.checkpoints)
    return index


def listed_checkpoints(path: Path) -> list[Checkpoint]:
    """The checkpoints that a checkpoints.json lists.

    Raises:
        CheckpointError: as `read_index`; or it lists no checkpoint, or one whose file is missing.
    """
    index = read_index(path)
    if not index.checkpoints:
        raise CheckpointError(f"{path} lists no checkpoint; record at least one with CheckpointRecorder")
    for entry in index.checkpoints:
        if not (path.parent / entry.file).exists():
            raise CheckpointError(f"{path} names {entry.file}, which is missing; restore the file or remove the entry")
    return [
        Checkpoint(
            path.parent / entry.file,
            entry.step,
            entry.learning_rate,
            index.optimizer,
            index.batch_size,
            learning_rate_sum=entry.learning_rate_sum,
        )
        for entry in index.checkpoints
    ]


def how_to_write(directory: Path) -> str:
    """The remedy for a directory without checkpoints.json: text with a draft of the file."""
    files = sorted(path.name for path in directory.iterdir() if path.suffix in SUFFIXES) or ["weights.pt"]
    entries = ",\n   ".join(f'{{"file": "{file}", "step": ?, "learning_rate": ?}}' for file in files)
    return (
        f"record checkpoints with CheckpointRecorder, or write {directory / INDEX_NAME} yourself, "
        f"with the optimizer step and learning rate of each checkpoint:\n"
        f'{{"optimizer": {{"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}}, "batch_size": 64,\n'
        f' "checkpoints": [\n   {entries}]}}'
    )


def _check_file_name(path: Path, file: str) -> None:
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts or "\\" in file or not relative.name:
        raise CheckpointError(
            f"{path} names {file!r}; name files inside its own directory, relative to it, with / between folders"
        )
    if relative.suffix not in SUFFIXES and not (path.parent / file).is_dir():
        raise CheckpointError(
            f"{path} names {file!r}, whose kind is not known; files of weights end in {', '.join(SUFFIXES)}"
        )


def _check_unique(path: Path, what: str, values: list[Any]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise CheckpointError(
            f"{path} has the same {what} more than once ({repeated[0]!r}); each checkpoint needs its own"
        )


def _check_sums(path: Path, entries: list[FileEntry]) -> None:
    summed = [entry for entry in sorted(entries, key=lambda entry: entry.step) if entry.learning_rate_sum is not None]
    for before, after in pairwise(summed):
        if (after.learning_rate_sum or 0.0) < (before.learning_rate_sum or 0.0):
            raise CheckpointError(
                f"{path}: learning_rate_sum falls from step {before.step} to step {after.step}; give the sum over all "
                "steps from the training's first one on, or leave it out"
            )
