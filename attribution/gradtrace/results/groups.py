"""Influence of groups of training rows: sums of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import QueryError
from gradtrace.results.display import frame, table_html, table_text
from gradtrace.task import Label

if TYPE_CHECKING:
    import pandas

MAX_GROUPS = 1000


@dataclass(frozen=True, slots=True)
class GroupInfluence:
    """Rows that share a column's value, and the sum and mean of their scores on a query."""

    group: Label | None  # the value; None: rows of which it is not known
    rows: int
    sum: float
    mean: float


class GroupInfluences(list[GroupInfluence]):
    """The groups of one query, the largest sum first."""

    def to_pandas(self) -> pandas.DataFrame:
        """A line for each group. Raises MissingLibraryError where pandas is not installed."""
        return frame([asdict(group) for group in self])

    def __repr__(self) -> str:
        return table_text(_HEADS, self._lines()) if self else "[]"

    def _repr_html_(self) -> str:
        return table_html("Influence of groups", _HEADS, ([escape(cell) for cell in line] for line in self._lines()))

    def _lines(self) -> list[list[str]]:
        return [[str(group.group), str(group.rows), f"{group.sum:+.4g}", f"{group.mean:+.4g}"] for group in self]


_HEADS = ("group", "rows", "sum", "mean")


class RowGroups:
    """Stored rows by the value that a column has for them."""

    def __init__(self, columns: Mapping[str, NDArray[Any]], by: str, allowed: NDArray[np.bool_] | None) -> None:
        """
        Args:
            columns: of the index, each [stored rows].
            by: the column.
            allowed: bool [stored rows], rows that count; None: all.

        Raises:
            QueryError: an unknown column, or one of too many values.
        """
        if by not in columns:
            raise QueryError(f"there is no column {by!r} to group by; the index has {', '.join(columns)}")
        self._rows = np.arange(len(columns[by])) if allowed is None else np.flatnonzero(allowed)
        column = columns[by][self._rows]
        # Unknown values are NaN here, which np.unique counts as equal and puts last.
        values, self._numbers = np.unique(column.astype(np.float64), return_inverse=True)
        if len(values) > MAX_GROUPS:
            raise QueryError(
                f"column {by} has {len(values)} different values, and {MAX_GROUPS} groups are the most: group by "
                "label, prediction or correct"
            )
        kind = bool if by == "correct" else int
        self._values = [_plain(value, kind) for value in values.tolist()]
        self._counts = np.bincount(self._numbers, minlength=len(values))

    def influence(self, scores: NDArray[np.float32]) -> GroupInfluences:
        """By group, the largest sum first.  scores: [stored rows] of one query; summed in float64."""
        sums = np.bincount(self._numbers, weights=scores[self._rows], minlength=len(self._values))
        totals = zip(self._values, self._counts.tolist(), sums.tolist(), strict=True)
        groups = [GroupInfluence(value, count, total, total / count) for value, count, total in totals]
        return GroupInfluences(sorted(groups, key=lambda group: -group.sum))


def _plain(value: float, kind: type[int]) -> Label | None:
    """An integer or a bool, if the value is whole; None for NaN."""
    if value != value:
        return None
    return kind(value) if value.is_integer() else value
