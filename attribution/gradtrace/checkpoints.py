"""Checkpoints on disk: weights, and the step and learning rate that they were trained with.

A checkpoint directory holds weight files (`.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` as written by `torch.save`)
and a `checkpoints.json` beside them:

    {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
     "batch_size": 64,
     "checkpoints": [{"file": "a.pt", "step": 188, "learning_rate": 0.03},
                     {"file": "b.pt", "step": 376, "learning_rate": 0.01}]}

`optimizer` and `batch_size` may be left out. `file` MUST be relative and stay inside the directory; its last part is
the checkpoint's name and MUST be unique. `step` is the number of optimizer steps taken before the weights were saved
and MUST be unique. `learning_rate` is the rate of that step and MUST be above zero. The order of the list is free.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from gradtrace.errors import CheckpointError

INDEX_NAME = "checkpoints.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NESTING_KEYS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What the methods need to know of the optimizer; `name` is its class name in lower case ("sgd", "adamw")."""

    name: str
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights after `step` optimizer steps, the last of them taken with `learning_rate`."""

    path: Path
    step: int
    learning_rate: float
    optimizer: Optimizer | None = None
    batch_size: int | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def load(self) -> dict[str, Tensor]:
        """The state dict on the CPU, without nesting and without prefixes of DistributedDataParallel and torch.compile.

        Nothing but tensors and plain containers is unpickled.

        Raises:
            CheckpointError: the file is missing, damaged, would run code, or holds no state dict.
        """
        state = _state_dict(self.path, _read(self.path))
        return {name: state[key] for name, key in _plain_names(state).items()}

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}); restore the file") from None
        return digest.hexdigest()


class OptimizerEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    momentum: FiniteFloat = 0.0
    weight_decay: FiniteFloat = 0.0


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: str
    step: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[FiniteFloat, Field(gt=0)]


class CheckpointIndex(BaseModel):
    """checkpoints.json, as the module's docstring describes it."""

    model_config = ConfigDict(extra="forbid")

    optimizer: OptimizerEntry | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    checkpoints: list[FileEntry] = []


def load_checkpoints(directory: str | Path) -> list[Checkpoint]:
    """The checkpoints of a directory, ordered by step. Weights are read only by `Checkpoint.load`.

    Raises:
        CheckpointError: no directory, no or a malformed checkpoints.json, no checkpoint in it, or a file is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"no directory {directory}; give the one that the training wrote its checkpoints to")
    index = read_index(directory)
    if not index.checkpoints:
        raise CheckpointError(
            f"{directory / INDEX_NAME} lists no checkpoint; record at least one with CheckpointRecorder"
        )
    optimizer = Optimizer(**index.optimizer.model_dump()) if index.optimizer else None
    return [
        Checkpoint(_existing(directory, entry.file), entry.step, entry.learning_rate, optimizer, index.batch_size)
        for entry in sorted(index.checkpoints, key=lambda entry: entry.step)
    ]


def read_index(directory: Path) -> CheckpointIndex:
    """Read and validate `directory/checkpoints.json`; does not look at the files that it names.

    Raises:
        CheckpointError: it is missing or malformed, or names a step or a file twice or a file outside the directory.
    """
    path = directory / INDEX_NAME
    try:
        index = CheckpointIndex.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(_how_to_write_index(directory)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except ValidationError as error:
        raise CheckpointError(f"{path} is malformed; correct it:\n{_problems(error)}") from None
    for entry in index.checkpoints:
        _check_file_name(path, entry.file)
    _check_unique(path, "step", [entry.step for entry in index.checkpoints])
    _check_unique(path, "file name", [PurePosixPath(entry.file).name for entry in index.checkpoints])
    return index


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model, all of them or none.

    A weight may be left out of the file where the model ties it to one that is there (safetensors files do so).

    Raises:
        CheckpointError: names or shapes differ; the text lists those missing, unexpected and of another shape.
    """
    state = checkpoint.load()
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = _plain_names(wanted)
    tied = {wanted[key].data_ptr() for name, key in names.items() if name in state}
    shared = names.keys() & state.keys()
    differences = {
        "missing": [name for name in names if name not in state and wanted[names[name]].data_ptr() not in tied],
        "unexpected": [name for name in state if name not in names],
        "of another shape": [
            f"{name} (checkpoint {list(state[name].shape)}, model {list(wanted[names[name]].shape)})"
            for name in sorted(shared)
            if state[name].shape != wanted[names[name]].shape
        ],
    }
    if any(differences.values()):
        text = "; ".join(f"{kind}: {_listing(names)}" for kind, names in differences.items() if names)
        raise CheckpointError(
            f"{checkpoint.path} does not fit the task's model; give the model that was trained. {text}"
        )
    model.load_state_dict({names[name]: state[name] for name in shared}, strict=False)


def _read(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is of no known kind; weights end in {', '.join(SUFFIXES)}")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}; restore it or take it out of {INDEX_NAME}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects beside tensors, which are never loaded; "
            f"save `model.state_dict()` alone. PyTorch said: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # both readers raise whatever malformed bytes lead to
        raise CheckpointError(f"{path} is damaged or no weight file; save it again. Cause: {error}") from None


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in `content`, under at most one of the usual keys."""
    for key in _NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        found = "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {found}, no state dict; save `model.state_dict()`")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{path} holds entries that are no named tensors ({_listing(others)}); "
            f"save `model.state_dict()`, alone or under one of the keys {', '.join(_NESTING_KEYS)}"
        )
    return dict(content)


def _plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Name without wrapper prefixes -> key as it stands. `module.` is a wrapper's only where every key has it."""
    names = {key.replace("_orig_mod.", ""): key for key in keys}
    if names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): key for name, key in names.items()}
    return names


def _existing(directory: Path, file: str) -> Path:
    path = directory / file
    if not path.is_file():
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {file}, which is not there; restore the file or take the entry out"
        )
    return path


def _check_file_name(path: Path, file: str) -> None:
    parts = PurePosixPath(file)
    if parts.is_absolute() or ".." in parts.parts or "\\" in file or not parts.name:
        raise CheckpointError(
            f"{path} names {file!r}; name files inside its own directory, relative to it, with / between folders"
        )
    if parts.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} names {file!r}, which is of no known kind; weights end in {', '.join(SUFFIXES)}")


def _check_unique(path: Path, what: str, values: list[Any]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise CheckpointError(
            f"{path} has the same {what} more than once ({repeated[0]!r}); each checkpoint needs its own"
        )


def _problems(error: ValidationError) -> str:
    return "\n".join(f"  {'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _how_to_write_index(directory: Path) -> str:
    files = sorted(path.name for path in directory.iterdir() if path.suffix in SUFFIXES) or ["weights.pt"]
    entries = ",\n   ".join(f'{{"file": "{file}", "step": ?, "learning_rate": ?}}' for file in files)
    return (
        f"{directory / INDEX_NAME} is missing; record checkpoints with CheckpointRecorder, or write the file yourself, "
        f"with the optimizer step and learning rate of each checkpoint:\n"
        f'{{"optimizer": {{"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}}, "batch_size": 64,\n'
        f' "checkpoints": [\n   {entries}]}}'
    )
