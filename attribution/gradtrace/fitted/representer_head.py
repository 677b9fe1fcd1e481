"""The model's last layer, refitted with L2 regularisation on the stored representations (Yeh et al. 2018).

With f = (representation, 1) and phi = weights f, the refitted layer minimises over the training rows

    (1/n) sum_i L(phi_i, y_i) + l2 |weights|^2

L is the cross-entropy of the softmax of phi for classes, (phi - y)^2 for values. At the minimum (Theorem 3.1)

    weights_j = sum_i alpha_ij f_i        alpha_ij = -1 / (2 l2 n) dL(phi_i, y_i) / dphi_ij

so that each row has a share in the output for class j: phi_j(query) = sum_i alpha_ij <f_i, f_query>.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Manifest, RepresenterEntry
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors

_RESIDUAL = 1e-4  # |sum_i alpha_i f_i - weights| / |weights| at which the fit has converged
_ROUNDS = 200  # of L-BFGS
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Refit:
    """The refitted layer at every checkpoint with representations.

    entry: how it was fitted
    weights: float64 [represented checkpoints, outputs, features + 1]
    shares: alpha, float64 [represented checkpoints, stored rows, outputs], zero for deleted rows
    """

    entry: RepresenterEntry
    weights: Tensor
    shares: Tensor


def loss_slopes(outputs: Tensor, labels: Tensor, classes: int | None) -> Tensor:
    """dL / dphi, of classes or of values. outputs: [n, outputs];  labels: [n], int64 or floating point."""
    if classes is None:
        return 2 * (outputs - labels[:, None])
    return outputs.softmax(1) - F.one_hot(labels, classes)


def with_constant(representations: Tensor) -> Tensor:
    """[..., features] -> [..., features + 1], the last being one: its weight is the layer's bias."""
    return F.pad(representations, (0, 1), value=1.0)


def fit_head(f: Tensor, labels: Tensor, classes: int | None, l2: float) -> tuple[Tensor, Tensor, float]:
    """Fit the layer by L-BFGS, until its weights are the sum of the rows' shares.

    Args:
        f: float64 [n, features + 1], the representations with a constant.
        labels: [n], int64 classes, or float64 values where `classes` is None.

    Returns:
        weights: float64 [outputs, features + 1].
        shares: alpha, float64 [n, outputs].
        residual: how far the sum of the shares is from the weights, relative to these.

    Raises:
        StoreError: the fit does not converge.
    """
    weights = torch.zeros(classes or 1, f.shape[1], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        outputs = f @ weights.T  # [n, outputs]
        weights.grad = loss_slopes(outputs, labels, classes).T @ f / len(f) + 2 * l2 * weights
        errors = (outputs[:, 0] - labels).square() if classes is None else F.cross_entropy(outputs, labels)
        return errors.mean() + l2 * weights.square().sum()

    for _ in range(_ROUNDS):
        optimizer.step(objective)  # 20 iterations
        shares = loss_slopes(f @ weights.T, labels, classes) / (-2 * l2 * len(f))
        residual = float((shares.T @ f - weights).norm() / weights.norm().clamp_min(_TINY))
        if residual <= _RESIDUAL or not weights.any():
            return weights, shares, residual
    raise StoreError(
        f"the refitted layer is still {residual:.1e} of its weights away from the sum of the rows' shares: choose a "
        "larger l2"
    )


def load_refit(directory: Path, manifest: Manifest) -> Refit | None:
    """The refitted layer of an index; None if it has none, or one that was fitted on other rows.

    Raises:
        CorruptIndexError: the file is missing or damaged.
    """
    entry = manifest.representer
    if entry is None or manifest.representer_is_stale():
        return None
    runs, outputs = len(manifest.represented), entry.classes or 1
    path, shares = regular_path(directory, entry.file.path), (runs, manifest.rows, outputs)
    tensors = load_tensors(path, "fit it again", weights=(runs, outputs, None), shares=shares)
    return Refit(entry, tensors["weights"], tensors["shares"].double())
