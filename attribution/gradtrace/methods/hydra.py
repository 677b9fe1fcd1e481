"""HyDRA: how the trained model's loss on the query moves with each row's weight in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Method
from gradtrace.methods.options import MethodOptions
from gradtrace.store.manifest import Manifest
from gradtrace.task import Example


class Hydra(Method):
    """HyDRA, Chen et al. 2021, the fast version without Hessian: - grad l(z', theta_T) . d theta_T / d w_z.

    w_z is the weight of row z in the training loss, and d theta_T / d w_z is followed through the whole training,
    momentum and weight decay included, as `gradtrace.recording.hydra` tells (Bae et al. 2024, Equation 35). It is
    the block of kind "recorded", from a recording of the training.
    """

    name = "hydra"
    options = ()
    forecasts = True

    def lacks(self, manifest: Manifest) -> str | None:
        if any(entry.kind == "recorded" for entry in manifest.checkpoints):
            return None
        return (
            "it holds no recording of the training; record one with gradtrace.InfluenceRecorder, and build the index "
            "with recording=... (`gradtrace build --recording DIR`)"
        )

    def meaning(self, options: MethodOptions) -> str:
        return (
            "Score: how much what is explained would fall, in its own unit, if the row counted twice in the whole "
            "training, to first order and without the curvature of the loss"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries = contents.manifest.checkpoints
        recorded = next(position for position, entry in enumerate(entries) if entry.kind == "recorded")
        trained = next(
            position
            for position, entry in enumerate(entries)
            if entry.kind == "weights" and entry.sha256 == entries[recorded].sha256
        )
        return _HydraScoring(contents, [recorded], torch.ones(1, 1), query_at=[trained])


class _HydraScoring(GradientScoring):
    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        raise QueryError(
            "method 'hydra' knows the rows that were trained on alone: ask for other examples by another method"
        )
