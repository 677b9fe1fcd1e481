"""Near-duplicates among the hits of an end: rows whose vectors in the index have almost the same direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradtrace.methods.method import Scoring
from gradtrace.methods.norms import inverse
from gradtrace.search.scored_rows import Rows

NEAR_DUPLICATE = 0.97  # cosine; docs/queries.md has the measurement
MOST_CLUSTERED = 1000  # hits of an end: every one is compared with every other


def cluster_leaders(scoring: Scoring[Any], positions: Rows) -> Rows:
    """For each hit the highest hit that it is a near-duplicate of, itself if it is of none. int64 [m]

    Clusters do not chain: a member is near to its leader, and a leader is near to no leader above it.

    positions: int64 [m] in the store, of the hits of an end, the most extreme first
    """
    near = (_cosines(scoring, positions) >= NEAR_DUPLICATE).numpy()  # [m, m]
    np.fill_diagonal(near, True)  # a row of zeros has no direction
    leads = np.zeros(len(positions), dtype=np.bool_)
    leaders = np.empty_like(positions)
    for place in range(len(positions)):
        leads[place] = not (near[place] & leads).any()
        leaders[place] = positions[np.argmax(near[place] & leads)]  # the first
    return leaders


def _cosines(scoring: Scoring[Any], positions: Rows) -> Tensor:
    """Of the stored rows, each over all blocks that are scored. float64 [m, m]"""
    products = torch.from_numpy(scoring.row_products(positions))
    scale = inverse(products.diagonal().sqrt())
    return products * scale[:, None] * scale
