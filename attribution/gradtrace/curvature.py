"""Reading the curvature of an index: its checkpoints' eigenvalues in the columns of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CorruptIndexError
from gradtrace.manifest import Manifest


def read_curvature(directory: Path, manifest: Manifest, checkpoints: Sequence[int], name: str) -> Tensor:
    """One tensor of the curvature files of some checkpoints ("eigenvalues", "preconditioner"). [n, dimensions] float32.

    Raises:
        CorruptIndexError: a file is missing or damaged, or lacks the tensor.
    """
    files = [directory / manifest.curvature[position].path for position in checkpoints]
    try:
        return torch.stack([load_file(path)[name] for path in files])
    except (OSError, SafetensorError, KeyError) as error:
        raise CorruptIndexError(
            f"the curvature in {directory} cannot be read ({error}); restore it or rebuild the index"
        ) from None
