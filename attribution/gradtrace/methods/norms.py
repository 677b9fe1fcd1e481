"""Norms of gradients, by which cosines are divided, and which give the self-influence of products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradtrace.search.scored_rows import Doubles, Floats
from gradtrace.store.stored_rows import StoredRows

_NO_DIRECTION = 2.0**-100  # rows with norms this small relative to the largest count as zero: float32 underflows


def inverse(norms: Tensor) -> Tensor:
    """1 / norm, and 0 for zero gradients: these have no direction, so no cosine but 0."""
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


def live_norms(store: StoredRows, blocks: Sequence[int]) -> Doubles:
    """float64 [blocks, stored rows]; zero for deleted rows, to which the others must not be compared."""
    norms = np.stack([store.norms(block) for block in blocks]).astype(np.float64)
    norms[:, ~store.row_ids.live()] = 0
    return norms


def inverse_row_norms(norms: Doubles) -> Tensor:
    """1 / norm over all blocks, 0 for rows without a direction. [blocks, stored rows] -> float32 [stored rows]"""
    total = torch.from_numpy(np.sqrt((norms**2).sum(0)))
    return torch.where(total > _NO_DIRECTION * total.max(), inverse(total), 0).float()


def squared_norm_sums(norms: Doubles, weights: Doubles) -> Floats:
    """The weighted sums over blocks of squared norms. [blocks, stored rows], [blocks] -> float32 [stored rows]"""
    sums: Floats = (weights @ norms**2).astype(np.float32)
    return sums
