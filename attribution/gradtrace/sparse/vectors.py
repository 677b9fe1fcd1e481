"""Sparse vectors: of each, the coordinates that it keeps and their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

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

    def __getitem__(self, numbers: slice) -> SparseVectors:
        return SparseVectors(self.coordinates[numbers], self.values[numbers])

    @classmethod
    def joined(cls, vectors: Sequence[SparseVectors]) -> SparseVectors:
        """One after another; all have as many coordinates."""
        return cls(np.concatenate([v.coordinates for v in vectors]), np.concatenate([v.values for v in vectors]))

    def times(self, factors: NDArray[np.float32]) -> SparseVectors:
        """Each vector times its factor [n]."""
        return SparseVectors(self.coordinates, self.values * factors[:, None])

    def mean(self) -> SparseVectors:
        """The mean of all, as one vector of as many coordinates as are in any of them."""
        coordinates, places = np.unique(self.coordinates, return_inverse=True)
        sums = np.bincount(places.ravel(), self.values.ravel().astype(np.float64), len(coordinates))
        return SparseVectors(coordinates[None], (sums / len(self)).astype(np.float32)[None])

    def entries(self) -> Entries:
        n, m = self.coordinates.shape
        return Entries(n, np.repeat(np.arange(n), m), self.coordinates.ravel(), self.values.ravel().astype(np.float64))


@dataclass(frozen=True, eq=False)
class Entries:
    """The values of n vectors, in any order.

    places: int64 [p], the number of each value's vector;  coordinates: uint32 [p];  values: float64 [p]
    """

    n: int
    places: NDArray[np.int64]
    coordinates: NDArray[np.uint32]
    values: NDArray[np.float64]

    def products(self, others: Entries) -> NDArray[np.float64]:
        """The inner product of each vector with each of the others. [n, n of the others]"""
        both, numbers = np.unique(np.append(self.coordinates, others.coordinates), return_inverse=True)
        own, theirs = np.split(numbers, [len(self.coordinates)])
        left = csr_array((self.values, (self.places, own)), shape=(self.n, len(both)))
        right = csr_array((others.values, (others.places, theirs)), shape=(others.n, len(both)))
        products: NDArray[np.float64] = (left @ right.T).toarray()
        return products


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The rows of n examples: the strongest coordinates of each whitened gradient.

    norms: float32 [n], of the whole gradients, not whitened
    """

    vectors: SparseVectors
    norms: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.norms)

    @classmethod
    def joined(cls, rows: Sequence[SparseRows]) -> SparseRows:
        """One after another; all have as many coordinates."""
        return cls(SparseVectors.joined([each.vectors for each in rows]), np.concatenate([each.norms for each in rows]))


def check_coordinates(count: int) -> None:
    """Raises UnsupportedLayerError where a model has more coordinates than can be named."""
    if count > LARGEST_COORDINATE + 1:
        raise UnsupportedLayerError(
            f"sparse rows can name {LARGEST_COORDINATE + 1:,} weights, the task attributes {count:,}: choose some of "
            "them with Task.layers"
        )
