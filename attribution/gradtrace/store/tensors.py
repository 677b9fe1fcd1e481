"""Reading the tensors of an index's safetensors files."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gradtrace.errors import CorruptIndexError

_LARGEST_COPY = 64 << 20  # bytes of a file that is copied to memory; larger ones are mapped


def load_tensors(path: Path, remedy: str, **shapes: tuple[int | None, ...]) -> dict[str, Tensor]:
    """A safetensors file's tensors by name, on the CPU.

    Small files are copied to memory, so that nothing that happens to the file later does any harm; larger ones are
    memory-mapped.

    Args:
        remedy: what to do if the file cannot be restored.
        shapes: of the tensors that must be there; None stands for any length.

    Raises:
        CorruptIndexError: the file is missing or damaged, lacks a tensor, or has one of another shape.
    """
    try:
        small = path.stat().st_size <= _LARGEST_COPY
        tensors = safetensors.torch.load(path.read_bytes()) if small else safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptIndexError(f"{path} cannot be read ({error}); restore it or {remedy}") from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise CorruptIndexError(f"{path} has no {name}; restore it or {remedy}")
        if not _has_shape(tensors[name], shape):
            raise CorruptIndexError(
                f"{path} has {name} of shape {list(tensors[name].shape)}, which does not fit; restore it or {remedy}"
            )
    return tensors


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    sizes = zip(tensor.shape, shape, strict=False)
    return tensor.ndim == len(shape) and all(wanted in (None, size) for size, wanted in sizes)
