"""What queries become: vectors whose inner products with the rows of an index are scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.search.scored_rows import Doubles
from gradtrace.sparse.vectors import SparseVectors


@dataclass(frozen=True, eq=False)
class SparseQueries:
    """The vectors of queries whose rows are sparse. by_block: at each block, of all queries"""

    by_block: Sequence[SparseVectors]

    def __len__(self) -> int:
        return len(self.by_block[0])

    def __getitem__(self, numbers: slice) -> SparseQueries:
        return SparseQueries([vectors[numbers] for vectors in self.by_block])

    def __iter__(self) -> Iterator[SparseQueries]:
        """The queries one by one."""
        return (self[number : number + 1] for number in range(len(self)))

    def mean(self) -> SparseQueries:
        """The mean of all queries, as one."""
        return SparseQueries([vectors.mean() for vectors in self.by_block])

    def times(self, factors: Doubles) -> SparseQueries:
        """factors: of each block"""
        by_block = zip(self.by_block, factors.astype("float32"), strict=True)
        return SparseQueries([SparseVectors(v.coordinates, v.values * factor) for v, factor in by_block])


Vectors = Tensor | SparseQueries  # a tensor is [queries, blocks, dimensions]


def is_zero(vectors: Vectors) -> bool:
    """Whether all are; then every score is zero."""
    if isinstance(vectors, SparseQueries):
        return not any(v.values.any() for v in vectors.by_block)
    return not bool(vectors.any())


def mean_vector(vectors: Vectors) -> Vectors:
    """That of all queries, as vectors of a single one."""
    return vectors.mean() if isinstance(vectors, SparseQueries) else vectors.mean(0, keepdim=True)


def vector_batches(vectors: Vectors, size: int) -> Iterator[Vectors]:
    """The vectors of at most `size` queries at a time."""
    for start in range(0, len(vectors), size):
        yield vectors[start : start + size]


def times_blocks(vectors: Vectors, factors: Doubles) -> Vectors:
    """Each query's vectors times the factors [blocks]."""
    if isinstance(vectors, SparseQueries):
        return vectors.times(factors)
    return vectors * torch.from_numpy(factors).to(vectors)[:, None]
