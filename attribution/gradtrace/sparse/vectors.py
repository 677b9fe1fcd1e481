"""Sparse vectors: of each, the coordinates that it keeps and their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import UnsupportedLayerError

LARGEST_COORDINATE = 2**32 - 1  # of those that a coordinate's 32 bits can name


@dataclass(frozen=True, eq=False)
class SparseVectors:
    """As many coordinates of each of n vectors. A value of zero is like a coordinate that is not kept.

    coordinates: uint32 [n, m], ascending in each vector and different from each other
    values: float32 [n, m]
    """

    coordinates: NDArray[np.uint32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.coordinates)


def check_coordinates(count: int) -> None:
    """Raises UnsupportedLayerError where a model has more coordinates than can be named."""
    if count > LARGEST_COORDINATE + 1:
        raise UnsupportedLayerError(
            f"sparse rows can name {LARGEST_COORDINATE + 1:,} weights, the task attributes {count:,}: choose some of "
            "them with Task.layers"
        )
