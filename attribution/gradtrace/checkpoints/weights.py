"""Reading weight files: safetensors, and what `torch.save` wrote, of which only tensors and plain containers load."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NESTING_KEYS = ("state_dict", "model_state_dict", "model")
_IN_DIRECTORIES = ("model.safetensors", "pytorch_model.bin")  # as Hugging Face's libraries name them


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: the path itself, or those in it that Hugging Face's libraries write.

    Raises:
        CheckpointError: a directory without weights, or with an index of shards that is malformed.
    """
    if not path.is_dir():
        return [path]
    for name in _IN_DIRECTORIES:
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
    raise CheckpointError(f"{path} holds no {' and no '.join(_IN_DIRECTORIES)}; restore the weights that were saved")


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file or of a directory's files, on the CPU, without nesting and wrapper prefixes.

    Raises:
        CheckpointError: a file is missing, damaged, would run code, or holds no state dict.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state |= _state_dict(file, read_file(file))
    return {name: state[key] for name, key in plain_names(state).items()}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the weight file; of a directory, of its weight files after one another."""
    digest = hashlib.sha256()
    try:
        for part in weight_files(path):
            with part.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore the file") from None
    return digest.hexdigest()


def read_file(path: Path, lazily: bool = False) -> Any:
    """What a weight file holds. `lazily`: tensors are mapped to memory, which costs nothing until they are used.

    Raises:
        CheckpointError: the file is missing, damaged, of no known kind, or would run code.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is of no known kind; weights end in {', '.join(SUFFIXES)}")
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
        )
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}; restore it or take it out of checkpoints.json") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects beside tensors, which are never loaded; "
            f"save `model.state_dict()` alone. PyTorch said: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # both readers raise whatever malformed bytes lead to
        raise CheckpointError(f"{path} is damaged or no weight file; save it again. Cause: {error}") from None


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Name without wrapper prefixes -> key as it stands. `module.` is a wrapper's only where every key has it."""
    names = {key.replace("_orig_mod.", ""): key for key in keys}
    wrapped = {
        name: key for name, key in names.items() if name != "n_averaged"
    }  # torch.optim.swa_utils.AveragedModel's
    if wrapped and all(name.startswith("module.") for name in wrapped):
        return {name.removeprefix("module."): key for name, key in wrapped.items()}
    return names


def listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shards(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, all beside it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if names and all(PurePosixPath(name).name == name for name in names):
            return [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{index} is malformed: it maps no weights to files beside it; save the checkpoint again")


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
            f"{path} holds entries that are no named tensors ({listing(others)}); "
            f"save `model.state_dict()`, alone or under one of the keys {', '.join(_NESTING_KEYS)}"
        )
    return dict(content)
