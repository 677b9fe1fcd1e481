"""Influence of groups of training rows: sums of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.results.display import frame, table_html, table_text
from gradtrace.task import Label
from gradtrace.tasks.features import Cells, feature_cells, feature_names

if TYPE_CHECKING:
    import pandas

FEATURE = "feature:"  # begins the name of a column that is a feature of a table
MAX_GROUPS = 1000
_BINS = 10


@dataclass(frozen=True, slots=True)
class GroupInfluence:
    """Rows that share a column's value, or have one in the same range; the sum and mean of their scores on a query.

    group: the value; the range in words, such as "2 to 15"; None: rows of which the value is not known
    bounds: the smallest and the largest number of a range; None: the rows share one value
    """

    group: Label | str | None
    rows: int
    sum: float
    mean: float
    bounds: tuple[float, float] | None = None


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
    """Stored rows by the value that a column has for them: each value is a group, or, of numbers that are not whole or
    too many to tell apart, ten ranges that hold about as many rows each."""

    def __init__(self, by: str, cells: Cells, positions: NDArray[np.int64]) -> None:
        """
        Args:
            by: the column's name.
            cells: what it has for the rows that count, [rows]: numbers or texts, NaN or None where unknown.
            positions: int64 [rows], where these rows stand in the store.

        Raises:
            QueryError: the column has too many texts or classes.
        """
        self._positions = positions
        are_texts = any(isinstance(cell, str) for cell in cells)
        self._groups, self._numbers = _of_texts(by, cells) if are_texts else _of_numbers(by, _as_numbers(cells))
        self._counts = np.bincount(self._numbers, minlength=len(self._groups))

    def influence(self, scores: NDArray[np.float32]) -> GroupInfluences:
        """By group, the largest sum first.  scores: [stored rows] of one query; summed in float64."""
        sums = np.bincount(self._numbers, weights=scores[self._positions], minlength=len(self._groups))
        totals = zip(self._groups, self._counts.tolist(), sums.tolist(), strict=True)
        influences = [
            GroupInfluence(group.name, rows, total, total / rows, group.bounds) for group, rows, total in totals
        ]
        return GroupInfluences(sorted(influences, key=lambda group: -group.sum))


def row_groups(contents: IndexContents, by: str, allowed: NDArray[np.bool_] | None) -> RowGroups:
    """Groups of the rows that count, by a column of the index or by a feature.

    allowed: bool [stored rows], which count; None: all

    Raises:
        QueryError: there is no such column, or it has too many texts or classes.
    """
    columns, train = contents.columns, contents.task.train
    positions = np.arange(contents.store.rows) if allowed is None else np.flatnonzero(allowed)
    if by in columns:
        return RowGroups(by, columns[by][positions], positions)
    rows = contents.store.row_ids.ids[positions]
    names = {FEATURE + name: name for name in feature_names(contents.task, train, rows)}
    if by not in names:
        raise QueryError(f"there is no column {by!r} to group by; the index has {', '.join([*columns, *names])}")
    return RowGroups(by, feature_cells(contents.task, train, rows, [names[by]])[names[by]], positions)


class _Group(NamedTuple):
    name: Label | str | None
    bounds: tuple[float, float] | None = None


_Grouped = tuple[list[_Group], NDArray[np.int64]]  # the groups, and the number of each row's. int64 [rows]


def _of_texts(by: str, cells: Sequence[Any] | NDArray[Any]) -> _Grouped:
    texts = [None if cell is None else str(cell) for cell in cells]
    names = list(dict.fromkeys(texts))
    _check_number(by, len(names))
    numbers = {name: number for number, name in enumerate(names)}
    return [_Group(name) for name in names], np.array([numbers[text] for text in texts], dtype=np.int64)


def _as_numbers(cells: Cells) -> NDArray[Any]:
    return cells if isinstance(cells, np.ndarray) else np.array(cells, dtype=np.float64)  # None becomes NaN


def _of_numbers(by: str, cells: NDArray[Any]) -> _Grouped:
    # Unknown values are NaN here, which np.unique counts as equal and puts last.
    values, numbers = np.unique(cells.astype(np.float64), return_inverse=True)
    known = values[~np.isnan(values)]
    if np.issubdtype(cells.dtype, np.floating) and len(known) > (MAX_GROUPS if _are_whole(known) else _BINS):
        return _in_ranges(known, values[numbers])
    _check_number(by, len(values))
    kind = bool if by == "correct" else int
    return [_Group(_plain(value, kind)) for value in values.tolist()], numbers


def _in_ranges(known: NDArray[np.float64], numbers: NDArray[np.float64]) -> _Grouped:
    """Ranges of about as many rows each; equal values are never apart.

    known: the different values, ascending;  numbers: [rows], NaN where unknown, which is a group of its own
    """
    edges = np.unique(np.nanquantile(numbers, np.arange(1, _BINS) / _BINS, method="lower"))
    range_of_value = np.searchsorted(edges, known)
    firsts = np.flatnonzero(np.diff(range_of_value, prepend=-1))
    lows, highs = known[firsts], known[[*(firsts[1:] - 1), -1]]
    groups = [_range(low, high) for low, high in zip(lows.tolist(), highs.tolist(), strict=True)]
    numbers_of_rows = np.searchsorted(highs, numbers)  # NaN is sorted behind all: the group after them
    return groups + [_Group(None)] * bool(np.isnan(numbers).any()), numbers_of_rows


def _range(low: float, high: float) -> _Group:
    return _Group(_plain(low, int)) if low == high else _Group(f"{low:.7g} to {high:.7g}", (low, high))


def _are_whole(values: NDArray[np.float64]) -> bool:
    return bool((values == np.round(values)).all())


def _check_number(by: str, groups: int) -> None:
    if groups > MAX_GROUPS:
        raise QueryError(
            f"column {by} has {groups} different values, and {MAX_GROUPS} groups are the most: group by "
            "label, prediction or correct"
        )


def _plain(value: float, kind: type[int]) -> Label | None:
    """An integer or a bool, if the value is whole; None for NaN."""
    if value != value:
        return None
    return kind(value) if value.is_integer() else value
