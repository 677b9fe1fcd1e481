"""Reading the tensors of an index's files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CorruptIndexError


def load_tensors(path: Path, remedy: str, *names: str) -> dict[str, Tensor]:
    """A safetensors file's tensors by name, memory-mapped on the CPU.

    Args:
        remedy: what to do if the file cannot be restored.
        names: those that must be there.

    Raises:
        CorruptIndexError: the file is missing or damaged, or lacks a tensor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptIndexError(f"{path} cannot be read ({error}); restore it or {remedy}") from None
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise CorruptIndexError(f"{path} has no {lacking[0]}; restore it or {remedy}")
    return tensors
