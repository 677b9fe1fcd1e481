"""Rows that all have the same columns: what a method may ask of them, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.store.stored_rows import StoredRows


class RowPass(ABC):
    """A computation on each stored row by itself. It is pickled where the rows are in other processes."""

    @abstractmethod
    def __call__(self, start: int, rows: Tensor) -> Tensor:
        """What it gives for the rows [b, checkpoints, dimensions] from position `start` on. [b, ...], on the CPU"""

    def of_rows(self, start: int, stop: int) -> RowPass:
        """The same for these rows alone, which it counts from 0, and on the CPU: no more than is needed there."""
        return self


class DenseRows(StoredRows):
    """The rows of an index in the coordinates of its basis.

    dimensions: number of coordinates of a row at one checkpoint
    """

    dimensions: int

    @abstractmethod
    def gather(self, checkpoints: Sequence[int], rows: Tensor | NDArray[np.int64] | Sequence[int]) -> Tensor:
        """The given rows [m], in their order, decoded. float32 [m, len(checkpoints), dimensions].

        Raises:
            QueryError: the index does not have one of the rows.
        """

    @abstractmethod
    def each_row(self, checkpoints: Sequence[int], block_rows: int, row_pass: RowPass) -> Tensor:
        """The results of a pass over all rows, `block_rows` of them at a time. [rows, ...]"""
