"""Which training rows a search may return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import QueryError
from gradtrace.task import Label


@dataclass(frozen=True, slots=True)
class RowFilter:
    """All conditions hold together; an empty filter admits every row.

    labels: the row's label is one of these;  correct_only: the last checkpoint predicts the row's label
    rows: only these;  exclude_rows: none of these
    """

    labels: Sequence[Label] | None = None
    correct_only: bool = False
    rows: Sequence[int] | None = None
    exclude_rows: Sequence[int] | None = None

    def mask(self, rows: int, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
        """bool [rows], or None where nothing is filtered.

        Raises:
            QueryError: a row that does not exist, or no row left.
        """
        if not self.correct_only and self.labels is None and self.rows is None and self.exclude_rows is None:
            return None
        allowed = np.ones(rows, dtype=bool)
        if self.labels is not None:
            allowed &= np.isin(columns["label"], list(self.labels))
        if self.correct_only:
            allowed &= columns["correct"] == True  # noqa: E712  (None, for unknown, is not True)
        if self.rows is not None:
            allowed &= _marked(rows, self.rows)
        if self.exclude_rows is not None:
            allowed &= ~_marked(rows, self.exclude_rows)
        if not allowed.any():
            raise QueryError("the filter leaves no training row; relax labels, correct_only, rows or exclude_rows")
        return allowed


def _marked(rows: int, chosen: Sequence[int]) -> NDArray[np.bool_]:
    wanted = np.asarray(list(chosen) or np.zeros(0, dtype=np.int64))
    if not np.issubdtype(wanted.dtype, np.integer):
        raise QueryError(f"rows and exclude_rows of a filter are row numbers, not {wanted.dtype} values")
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= rows):
        raise QueryError(
            f"the filter names row {wanted.min() if wanted.min() < 0 else wanted.max()}; rows are 0 to {rows - 1}"
        )
    marked = np.zeros(rows, dtype=bool)
    marked[wanted] = True
    return marked
