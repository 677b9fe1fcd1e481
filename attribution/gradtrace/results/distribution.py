"""Where a score stands among the scores of all rows: extreme, or one of many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The scores of all rows of the index on one query, whatever its filter.

    quantiles: by percentage ("0" is the lowest score, "50" the median, "100" the highest)
    """

    mean: float
    std: float
    quantiles: dict[str, float]


def describe(scores: NDArray[np.float32]) -> Distribution:
    """scores: [rows]."""
    values = np.percentile(scores, _QUANTILES)
    quantiles = {str(share): float(value) for share, value in zip(_QUANTILES, values, strict=True)}
    return Distribution(float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64)), quantiles)


def percentiles(scores: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The share of `scores` [rows] that are lower than each of `values` [m], in percent. [m]."""
    below = np.searchsorted(np.sort(scores), values, side="left")
    return 100.0 * below / len(scores)
