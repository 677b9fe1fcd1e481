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
from gradtrace.store.manifest import BasisEntry, Manifest
from gradtrace.store.row_ids import Ids
from gradtrace.store.rows import RowStore
from gradtrace_indexer.build.fit import Samples


def checkpoint_curvature(
    directory: Path,
    at: Manifest,
    basis: Basis | None,
    usable: Ids,
    model_of_checkpoint: Callable[[], GradientModel],
) -> dict[str, Tensor]:
    """The content of a curvature file: from the rows at the checkpoint, or from gradients of sampled rows, at their own
    or at sampled labels.

    at: the generation as if it had this checkpoint alone;  basis: None where rows are sparse
    usable: the training rows that may be read

    Raises:
        LossError: a row's loss or gradient is NaN or infinite.
        CurvatureError: there is no curvature: gradients are zero.
    """
    moments = at.checkpoints[0].second_moments
    if basis is not None and at.fisher is not None and at.fisher.source == "rows":
        store = RowStore(directory, at)
        fitted = torch.from_numpy(np.isin(store.row_ids.ids, usable[usable < at.basis.fitted_rows]))
        tensors = row_curvature(store, 0, at.fisher.output, fitted, basis.coordinates)
    else:
        tensors = _sampled_curvature(model_of_checkpoint(), at.basis, basis, usable)
    return tensors | (_preconditioner(model_of_checkpoint(), basis) if moments else {})


def _sampled_curvature(model: GradientModel, spec: BasisEntry, basis: Basis | None, usable: Ids) -> dict[str, Tensor]:
    samples = Samples(model.task, spec.seed, spec.fitted_rows, usable)
    with samples.named_in_errors():
        if basis is None:
            return gradient_squares(model, map(model.batch, samples))
        return curvature(model, basis, samples, spec.seed)


def _preconditioner(model: GradientModel, basis: Basis | None) -> dict[str, Tensor]:
    moments = model.checkpoint.second_moments(model.task.model())
    assert moments is not None  # the checkpoint is that of the manifest
    if basis is None:
        return {"preconditioner": weight_preconditioner(model, moments)}
    return {"preconditioner": preconditioner(model, basis.to(torch.device("cpu")), moments)}
