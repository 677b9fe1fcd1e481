"""HyDRA: the derivative of the trained model's loss on the query by each row's weight in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Method, MethodOptions
from gradtrace.store.manifest import Manifest
from gradtrace.task import Example


class Hydra(Method):
    """HyDRA, Chen et al. 2021, the fast version without Hessian: - grad l(z', theta_T) . d theta_T / d w_z.

    w_z is the weight of row z in the training loss. `gradtrace.recording.hydra` computes d theta_T / d w_z over the
    whole training, momentum and weight decay included (Bae et al. 2024, Equation 35); the index holds it as the block
    of kind "recorded".
    """

    name = "hydra"
    options = ()
    splits_by_token = False  # rows were recorded as wholes
    forecasts = True
    meaning = (
        "Score: how much what is explained would fall, in its own unit, if the row counted twice in the whole "
        "training, to first order and without the curvature of the loss"
    )
    removal = "the sum of their scores"

    def lacks(self, manifest: Manifest) -> str | None:
        if any(entry.kind == "recorded" for entry in manifest.checkpoints):
            return None
        if manifest.basis.is_sparse:
            return "its rows are sparse, and a recording's are not: build with rows='dense' and recording=..."
        return (
            "it holds no recording of the training; record one with gradtrace.InfluenceRecorder, and build the index "
            "with recording=... (`gradtrace build --recording DIR`)"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        kinds = [(entry.kind, entry.sha256) for entry in contents.manifest.checkpoints]
        recorded = [kind for kind, _ in kinds].index("recorded")
        trained = kinds.index(("weights", kinds[recorded][1]))
        scoring = _HydraScoring(contents, [recorded], torch.ones(1, 1), query_at=[trained])
        scoring.removal_factors = np.ones(1)
        return scoring


class _HydraScoring(GradientScoring):
    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        raise QueryError(
            "method 'hydra' knows the rows that were trained on alone: ask for other examples by another method"
        )
