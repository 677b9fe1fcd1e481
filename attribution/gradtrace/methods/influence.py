"""Influence functions with the eigenvalue-corrected Kronecker-factored curvature."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.curvature import read_curvature
from gradtrace.manifest import Manifest, by_run, trained_models
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Method, chosen_checkpoints
from gradtrace.methods.options import Options

DAMPING = 0.1


class Influence(Method):
    """Influence functions, Koh and Liang 2017, Equation 2, with EK-FAC (George et al. 2018; Grosse et al. 2023,
    Section 2.2): grad(z') . (H + damping)^-1 grad(z) at the trained model.

    In spectral coordinates H is diagonal, so every coordinate of the query is divided by its eigenvalue plus the
    damping, which is relative to the mean eigenvalue of the coordinate's layer. Several checkpoints are summed, and
    training runs averaged.
    """

    name = "influence"
    options: ClassVar[tuple[str, ...]] = ("checkpoints", "damping")

    def lacks(self, manifest: Manifest) -> str | None:
        if len(manifest.curvature) < len(manifest.checkpoints):
            return "it has no curvature; build it with basis='spectral'"
        return None

    def meaning(self, options: Options) -> str:
        return (
            "Score: inner product of the gradients of row and query under the inverse of the curvature, with damping "
            f"{options.damping or DAMPING:g} of its mean. To first order, how much what is explained would rise, in its "
            "own unit, were the model trained to its optimum without the row, times the number of training rows"
        )

    def scoring(self, contents: IndexContents, options: Options) -> GradientScoring:
        entries = contents.manifest.checkpoints
        chosen = chosen_checkpoints(entries, options.checkpoints, trained_models(entries))
        factors = _damped_inverse(contents, chosen, options.damping or DAMPING)
        return GradientScoring(contents, chosen, factors / len(by_run(entries, chosen)))


def _damped_inverse(contents: IndexContents, checkpoints: list[int], damping: float) -> Tensor:
    """1 / (eigenvalue + damping x the layer's mean eigenvalue), 0 where both are. float32 [checkpoints, dimensions]."""
    eigenvalues, means = (
        read_curvature(contents.directory, contents.manifest, checkpoints, name).double()
        for name in ("eigenvalues", "layer_means")
    )
    damped = eigenvalues + damping * means[:, contents.basis.layer_of_columns()]
    return torch.where(damped > 0, 1 / damped, 0).float()
