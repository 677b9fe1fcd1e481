"""TRAK's kernels: second moments, over all rows, of the compressed gradients of the model's output f."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Manifest, Output
from gradtrace.store.regular_files import regular_path
from gradtrace.store.rows import RowStore
from gradtrace.store.stored_rows import StoredRows
from gradtrace.store.tensors import load_tensors

_BLOCK_VALUES = 1 << 23  # float32 values of rows that are held at a time


@dataclass(frozen=True, eq=False, slots=True)
class Kernel:
    """TRAK's kernel at one checkpoint.

    inverse: float32 [dimensions, dimensions]
    weight: root mean square of |dL/df| over the rows
    smallest_weight: the smallest |dL/df| above zero of a row, taken for rows whose loss is rounded to zero
    """

    inverse: Tensor
    weight: float
    smallest_weight: float


def output_kind(columns: Mapping[str, NDArray[Any]]) -> Output:
    """The kind of the model's output f, from the label, prediction and loss of every row.

    Raises:
        StoreError: labels and predictions are neither all classes nor all real values, or a loss is negative.
    """
    if (columns["loss"] < 0).any():
        raise StoreError(
            "some losses are below zero, so they are neither -log p nor squared errors, and TRAK's kernel is unknown: "
            "ask by another method"
        )
    known = [columns[name] for name in ("label", "prediction") if not _missing(columns[name])]
    kinds = {np.issubdtype(values.dtype, np.integer) for values in known}
    if len(kinds) != 1:
        raise StoreError(
            "TRAK needs to know whether the loss is -log p of a class or a squared error, and takes it from labels and "
            "predictions, both whole numbers or both real: define label(self, example), and let predict give "
            "[batch, classes] scores for classes"
        )
    return "log odds" if kinds.pop() else "value"


def _missing(values: NDArray[Any]) -> bool:
    return values.dtype == object or (values.dtype.kind == "f" and bool(np.isnan(values).all()))


def output_weights(losses: Tensor, output: Output, smallest: float) -> Tensor:
    """|dL/df|, by how much the loss L changes with the output f; `smallest` where that is zero. Float32 as `losses`.

    Log odds: L = -log p, f = log(p / (1 - p)), so it is 1 - p (Park et al. 2023, Equation 12). Values: L = c (f - y)^2,
    so it is sqrt(2 L) with f in units of 1 / sqrt(2 c).
    """
    weights = -torch.expm1(-losses) if output == "log odds" else (2 * losses).sqrt()
    return torch.where(weights > 0, weights, smallest)


def stored_weights(store: StoredRows, checkpoint: int, output: Output, smallest: float) -> Tensor:
    """`output_weights` of all stored rows. Float32 [stored rows]."""
    return output_weights(torch.tensor(store.columns(checkpoint)["loss"]), output, smallest)


def share_at_smallest(store: RowStore, checkpoint: int, output: Output, smallest: float) -> float:
    """The share of the rows, without deleted ones, whose |dL/df| is the smallest above zero, or zero."""
    live = torch.from_numpy(store.row_ids.live())
    at_smallest = stored_weights(store, checkpoint, output, smallest)[live] <= smallest
    return (int(at_smallest.sum()) - 1) / len(at_smallest)


def compute_kernel(store: RowStore, checkpoint: int, output: Output, damping: float, device: torch.device) -> Kernel:
    """(Phi^T Phi + damping x its mean diagonal x I)^-1, where Phi [rows, D] holds each row's gradient of f, its stored
    gradient of the loss divided by |dL/df| (Park et al. 2023, Equation 13). Deleted rows are left out.

    Raises:
        StoreError: all gradients are zero.
    """
    live = torch.from_numpy(store.row_ids.live())
    weights = stored_weights(store, checkpoint, output, 0.0)
    above_zero = weights[live & (weights > 0)]
    smallest = float(above_zero.min()) if len(above_zero) else torch.finfo(weights.dtype).tiny
    weights = torch.where(weights > 0, weights, smallest)
    kernel = torch.zeros(store.dimensions, store.dimensions, dtype=torch.float64, device=device)
    for start, rows in store.blocks([checkpoint], max(1, _BLOCK_VALUES // store.dimensions)):
        part = slice(start, start + len(rows))
        features = (rows[:, 0] / weights[part, None])[live[part]].to(device)  # [b, D]
        kernel += features.T @ features
    scale = float(kernel.diagonal().mean())
    if not scale > 0:
        raise StoreError("the gradients of all rows are zero at a checkpoint, so TRAK has no kernel there")
    kernel.diagonal().add_(damping * scale)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel)).float().cpu().contiguous()
    return Kernel(inverse, float(weights[live].double().square().mean().sqrt()), smallest)


def load_kernels(directory: Path, manifest: Manifest, device: torch.device) -> dict[int, Kernel]:
    """An index's kernels by the positions of their checkpoints; memory-mapped on the CPU.

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    files = manifest.kernels.files if manifest.kernels else {}
    kernels = {}
    for position, entry in enumerate(manifest.checkpoints):
        if entry.name in files:
            path, shape = regular_path(directory, files[entry.name].path), (manifest.basis.dimensions,) * 2
            remedy = "go back to another generation"
            tensors = load_tensors(path, remedy, inverse=shape, weight=(), least=())
            weight, smallest = float(tensors["weight"]), float(tensors["least"])
            kernels[position] = Kernel(tensors["inverse"].to(device), weight, smallest)
    return kernels
