"""Rows that keep coordinates of their own: what a method may ask of them, wherever they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradtrace.search.scored_rows import Floats, Rows
from gradtrace.search.searcher import RowSearcher
from gradtrace.sparse.vectors import Entries, SparseVectors
from gradtrace.store.stored_rows import StoredRows

# Queries are given at each of the checkpoints, the same number of them.
InvertedSearcher = RowSearcher[Sequence[SparseVectors], Floats]


class InvertedRows(StoredRows):
    """The sparse rows of an index. `norms` are those of the whole gradients."""

    @property
    @abstractmethod
    def searcher(self) -> InvertedSearcher:
        """Over the rows at all checkpoints."""

    @abstractmethod
    def gather(self, checkpoint: int, rows: Rows) -> Entries:
        """The given rows, ascending [m], as they are stored. Reads the row numbers of every segment that has some."""

    @abstractmethod
    def square_sums(self, checkpoint: int, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each row the sum of its squared stored values, times the factors [coordinates]. float64 [rows]"""
