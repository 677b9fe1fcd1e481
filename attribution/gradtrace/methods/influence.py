"""Influence functions with a curvature that is diagonal in the index's coordinates."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.fitted.curvature import Columns
from gradtrace.methods.method import Method, MethodOptions, Scoring, chosen_checkpoints
from gradtrace.methods.sparse_scoring import scoring_of_rows
from gradtrace.store.manifest import by_run, trained_models, weights_positions

_DAMPING = 1.0  # chosen by measurement: docs/methods.md


class Influence(Method):
    """Influence functions, Koh and Liang 2017, Equation 2: q . H^-1 g, for gradients q of the query and g of the row.

    H is the damped Gauss-Newton matrix, or Fisher information, taken for diagonal in the index's coordinates:

        sum over coordinates j of  q_j g_j / (lambda_j + damping * mean lambda)

    In Gauss-Newton coordinates lambda comes from the rows (`fitted.gauss_newton`), the mean is that of all coordinates,
    and all checkpoints of a run count. In spectral ones lambda are the corrected eigenvalues of EK-FAC (Grosse et al.
    2023, Section 2.2; George et al. 2018), the mean is that of the coordinate's layer, and the last checkpoint counts.
    The coordinates of sparse rows are the weights themselves: lambda is the mean square of their gradients over rows at
    their own labels, the mean is that of the layer, and all checkpoints count.

    Weight decay is part of the loss's Hessian in theory, and is left out: with it, scores predicted retraining worse at
    the default damping (docs/methods.md).
    """

    name = "influence"
    options: ClassVar[tuple[str, ...]] = ("checkpoints", "damping")
    forecasts = True
    uses_curvature = True
    meaning = (
        "Score: how much what is explained would rise, in its own unit, had the model been trained to its optimum "
        "without the row, times the number of training rows: to first order, where the model as it is stands at its "
        "optimum. Of several checkpoints of a run, as usual, the sum of what each estimates; of several runs, the mean"
    )
    removal = "the sum of their scores, divided by the number of training rows and of the checkpoints used of a run"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        entries = contents.manifest.checkpoints
        usual = weights_positions(entries) if contents.sums_checkpoints else trained_models(entries)
        chosen = chosen_checkpoints(entries, options, usual)
        damping, runs = options.get("damping") or _DAMPING, len(by_run(entries, chosen))

        def inverse(place: int, columns: Columns) -> Tensor:
            curvature = contents.curvature[chosen[place]].at(columns)
            damped = curvature.eigenvalues.double() + damping * curvature.means.double()
            return torch.where(damped > 0, 1 / damped, 0) / runs  # a layer that no sample used has no curvature

        scoring = scoring_of_rows(contents, chosen, inverse)
        of_run = Counter(entries[checkpoint].run for checkpoint in chosen)
        estimates = np.array([of_run[entries[checkpoint].run] for checkpoint in chosen])
        scoring.removal_factors = 1 / (contents.manifest.task.train_rows * estimates)
        return scoring
