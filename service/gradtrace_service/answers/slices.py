"""What is computed of all rows of a data set, a slice at a time, so that no other request waits for all of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

_LARGEST = 64  # rows of a slice


class Sliced(ABC):
    """
    Attributes:
        rows: number of rows there are.
        done: how many of them are computed, from the first on.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.done = rows, 0
        self._size = 1

    @property
    def pending(self) -> int:
        return self.rows - self.done

    def advance(self, seconds: float, rows: int | None = None) -> None:
        """Compute rows for about so long. Slices grow while they are fast: a user's code may take seconds for a row.

        rows: stop once so many are done; None: go on to the last one
        """
        until, enough = time.perf_counter() + seconds, self.rows if rows is None else min(rows, self.rows)
        while self.done < enough and (started := time.perf_counter()) < until:
            stop = min(self.done + self._size, self.rows)
            self.compute(range(self.done, stop))
            self.done = stop
            took = time.perf_counter() - started
            self._size = min(2 * self._size, _LARGEST) if took < seconds / 8 else max(self._size // 2, 1)

    @abstractmethod
    def compute(self, rows: range) -> None:
        """Compute these rows, which follow those that are done."""
