"""Reading weight files: safetensors, and files of `torch.save`, from which only tensors and plain containers load."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NESTING_KEYS = ("state_dict", "model_state_dict", "model")
# As Hugging Face's libraries name them; the last two are PEFT's.
_IN_DIRECTORIES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint's weights: the path; of a directory, the weight files of Hugging Face's libraries.

    Raises:
        CheckpointError: the directory has no weights, or its index of shards is malformed.
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
    """As `Checkpoint.load`, from a file or a directory of files."""
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state |= _state_dict(file, read_file(file))
    return {name: state[key] for name, key in plain_names(state).items()}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the weight file, or of a directory's weight files concatenated. Raises CheckpointError.

    A file is read again only if its inode, size, or time of modification or change differs from the last time.
    """
    try:
        files = tuple(file.resolve() for file in weight_files(path))
        for file in files:
            _check_regular(file)
        return _sha256(files, tuple(map(_stamp, files)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore the file") from None


def _check_regular(path: Path) -> None:
    """Raises CheckpointError for what is there and is not a file, such as a device, which might never end."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file: put the weights that were saved there")


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=4096)
def _sha256(files: tuple[Path, ...], stamps: tuple[tuple[int, ...], ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_file(path: Path, lazily: bool = False) -> Any:
    """The content of a weight file. lazily: memory-map the tensors, so that they are read when they are used

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown kind, or would run code.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"the kind of {path} is not known; files of weights end in {', '.join(SUFFIXES)}")
    _check_regular(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; restore it or remove it from checkpoints.json") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects beside tensors, which are never loaded; "
            f"save `model.state_dict()` alone. PyTorch said: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # malformed bytes make both readers raise all kinds of exceptions
        raise CheckpointError(f"{path} is damaged or not a weight file; save it again. Cause: {error}") from None


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Name without prefixes of wrappers -> key in the state dict. `module.` is a wrapper's only if every key has it."""
    names = {key.replace("_orig_mod.", ""): key for key in keys}
    # torch.optim.swa_utils.AveragedModel adds n_averaged.
    wrapped = {name: key for name, key in names.items() if name != "n_averaged"}
    if wrapped and all(name.startswith("module.") for name in wrapped):
        return {name.removeprefix("module."): key for name, key in wrapped.items()}
    return names


def listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shards(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, all in its directory."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if names and all(PurePosixPath(name).name == name for name in names):
            return [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{index} is malformed: it maps no weights to files beside it; save the checkpoint again")


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in the content of a file, which may be nested under one of `_NESTING_KEYS`."""
    for key in _NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        kind = "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {kind}, not a state dict; save `model.state_dict()`")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{path} holds entries that are not named tensors ({listing(others)}); "
            f"save `model.state_dict()`, alone or under one of the keys {', '.join(_NESTING_KEYS)}"
        )
    return dict(content)
