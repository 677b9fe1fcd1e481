"""Reading the curvature of an index, in the columns of its rows."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CorruptIndexError
from gradtrace.store.manifest import Manifest


def load_curvature(directory: Path, manifest: Manifest) -> list[dict[str, Tensor]]:
    """By checkpoint "eigenvalues" [dimensions], "layer_means" [layers] and, where second moments were kept,
    "preconditioner" [dimensions], float32; none for bases without curvature.

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    try:
        return [load_file(directory / entry.path) for entry in manifest.curvature]
    except (OSError, SafetensorError) as error:
        raise CorruptIndexError(
            f"the curvature in {directory} cannot be read ({error}); restore it or rebuild the index"
        ) from None
