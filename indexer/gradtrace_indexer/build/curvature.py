"""The curvature at a checkpoint, in the coordinates of an unfinished generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.fitted.adam import preconditioner, weight_preconditioner
from gradtrace.fitted.ekfac import curvature
from gradtrace.fitted.gauss_newton import row_curvature
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.whitening import gradient_squares
from gradtrace.store.manifest import Manifest
from gradtrace.store.row_ids import Ids
from gradtrace.store.rows import RowStore
from gradtrace_indexer.build.fit import Samples


def checkpoint_curvature(
    directory: Path,
    manifest: Manifest,
    number: int,
    basis: Basis | None,
    usable: Ids,
    model_of_checkpoint: Callable[[], GradientModel],
) -> dict[str, Tensor]:
    """The content of a curvature file.

    number: of the checkpoint;  basis: None where rows are sparse;  usable: the training rows that may be read

    Raises:
        LossError: a row's loss or gradient is NaN or infinite.
        CurvatureError: there is no curvature: gradients are zero.
    """
    tensors = _eigenvalues(directory, manifest, number, basis, usable, model_of_checkpoint)
    if not manifest.checkpoints[number].second_moments:
        return tensors
    model = model_of_checkpoint()
    moments = model.checkpoint.second_moments(model.task.model())
    assert moments is not None  # the checkpoint is that of the manifest
    tensors["preconditioner"] = (
        weight_preconditioner(model, moments)
        if basis is None
        else preconditioner(model, basis.to(torch.device("cpu")), moments)
    )
    return tensors


def _eigenvalues(
    directory: Path,
    manifest: Manifest,
    number: int,
    basis: Basis | None,
    usable: Ids,
    model_of_checkpoint: Callable[[], GradientModel],
) -> dict[str, Tensor]:
    """From the rows at the checkpoint, or from gradients of sampled rows, at their own or at sampled labels."""
    spec = manifest.basis
    if basis is not None and manifest.fisher is not None and manifest.fisher.source == "rows":
        until_now = manifest.model_copy(update={"checkpoints": manifest.checkpoints[: number + 1]})
        store = RowStore(directory, until_now)
        fitted = np.isin(store.row_ids.ids, usable[usable < spec.fitted_rows])
        return row_curvature(store, number, manifest.fisher.output, torch.from_numpy(fitted), basis.coordinates)
    model = model_of_checkpoint()
    samples = Samples(model.task, spec.seed, spec.fitted_rows, usable)
    with samples.named_in_errors():
        if basis is None:
            return gradient_squares(model, map(model.batch, samples))
        return curvature(model, basis, samples, spec.seed)
