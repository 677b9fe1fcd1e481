"""TRAK's kernels: second moments, over all rows, of the compressed gradients of the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.manifest import Manifest
from gradtrace.store import RowStore

_BLOCK_VALUES = 1 << 23  # float32 values of rows that are held at a time
_LEAST_WEIGHT = 1e-6  # of the largest: float32 losses tell smaller ones badly


def output_weights(columns: Mapping[str, NDArray[Any]]) -> Tensor:
    """|dL/df| of every row: by how much the loss changes with the model's output f. float32 [rows], above zero.

    Class labels: L = -log p, f = log(p / (1 - p)), so it is 1 - p (Park et al. 2023, Equation 12). Real labels:
    L = c (f - y)^2, so it is sqrt(2 L) with f in units of 1 / sqrt(2 c).

    Args:
        columns: label, prediction and loss, each [rows], of one checkpoint.

    Raises:
        StoreError: labels and predictions are neither all classes nor all real values, or a loss is negative.
    """
    losses = torch.from_numpy(columns["loss"].astype(np.float32))
    if bool((losses < 0).any()):
        raise StoreError(
            "some losses are below zero, so they are neither -log p nor squared errors, and TRAK's kernel is unknown: "
            "ask by another method"
        )
    weights = -torch.expm1(-losses) if _has_classes(columns) else (2 * losses).sqrt()
    return weights.clamp_min(_LEAST_WEIGHT * float(weights.max()))


def _has_classes(columns: Mapping[str, NDArray[Any]]) -> bool:
    known = [columns[name] for name in ("label", "prediction") if not _missing(columns[name])]
    kinds = {np.issubdtype(values.dtype, np.integer) for values in known}
    if len(kinds) != 1:
        raise StoreError(
            "TRAK needs to know whether the loss is -log p of a class or a squared error, and takes it from labels and "
            "predictions, both whole numbers or both real: define label(self, example), and let predict give "
            "[batch, classes] scores for classes"
        )
    return kinds.pop()


def _missing(values: NDArray[Any]) -> bool:
    return values.dtype == object or (values.dtype.kind == "f" and bool(np.isnan(values).all()))


def inverse_kernel(store: RowStore, checkpoint: int, damping: float, device: torch.device) -> Tensor:
    """(Phi^T Phi + damping x its mean diagonal)^-1 at one checkpoint, Phi = rows / |dL/df| (Park et al. 2023,
    Equation 13). Float32 [dimensions, dimensions].

    Raises:
        StoreError: see `output_weights`; or all gradients are zero.
    """
    weights, live = output_weights(store.columns(checkpoint)), torch.from_numpy(store.row_ids.live())
    kernel = torch.zeros(store.dimensions, store.dimensions, dtype=torch.float64, device=device)
    for start, rows in store.blocks([checkpoint], max(1, _BLOCK_VALUES // store.dimensions)):
        part = slice(start, start + len(rows))
        features = (rows[:, 0] / weights[part, None])[live[part]].to(device)  # [b, D]
        kernel += features.T @ features
    scale = float(kernel.diagonal().mean())
    if not scale > 0:
        raise StoreError("the gradients of all rows are zero at a checkpoint, so TRAK has no kernel there")
    kernel.diagonal().add_(damping * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(kernel)).float().cpu().contiguous()


def load_kernels(directory: Path, manifest: Manifest, device: torch.device) -> dict[int, Tensor]:
    """The inverse kernels by their checkpoints' positions; memory-mapped on the CPU.

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    there = manifest.kernels.files if manifest.kernels else {}
    positions = [position for position, entry in enumerate(manifest.checkpoints) if entry.name in there]
    files = [directory / there[manifest.checkpoints[position].name].path for position in positions]
    try:
        loaded = [load_file(file)["inverse"].to(device) for file in files]
    except (OSError, SafetensorError, KeyError) as error:
        raise CorruptIndexError(
            f"a kernel of {directory} cannot be read ({error}); restore it, or go back to another generation"
        ) from None
    return dict(zip(positions, loaded, strict=True))
