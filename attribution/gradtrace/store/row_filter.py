"""Filters: conditions on the training rows that a search may return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import QueryError
from gradtrace.task import Label


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Conditions that a row must all meet. An empty filter admits every row.

    labels: the row's label is one of these; classes may be given by name
    correct_only: the last checkpoint predicts the row's label
    rows: only these;  exclude_rows: none of these
    where: conditions by column ("label", "prediction", "loss", "correct", "norm", all at the last checkpoint): one or
        more of "min", "max" (both inclusive) and "in": {"loss": {"min": 1.0}, "prediction": {"in": [3, 5]}}. A row
        whose value is unknown meets none.
    """

    labels: Sequence[Label | str] | None = None
    correct_only: bool = False
    rows: Sequence[int] | None = None
    exclude_rows: Sequence[int] | None = None
    where: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Raises QueryError for a condition of the wrong type."""
        for name in ("labels", "rows", "exclude_rows"):
            if getattr(self, name) is not None:
                _check_list(name, getattr(self, name))
        if not isinstance(self.correct_only, bool | np.bool_):
            raise QueryError(f"correct_only of a filter is True or False, not {self.correct_only!r}")
        conditions = {} if self.where is None else self.where
        if not isinstance(conditions, Mapping) or not all(isinstance(c, Mapping) for c in conditions.values()):
            raise QueryError(
                f'where of a filter gives conditions by column, such as {{"loss": {{"min": 1.0}}}}, not {self.where!r}'
            )

    @classmethod
    def of(cls, given: RowFilter | Mapping[str, Any] | None) -> RowFilter:
        """A filter from a mapping of its conditions, {"labels": [3], "correct_only": True}; a filter is returned as is.

        Raises:
            QueryError: an unknown condition, or one of the wrong type.
        """
        if isinstance(given, cls):
            return given
        if given is None:
            return cls()
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise QueryError(f"a filter is a RowFilter or a dict of {', '.join(known)}, not {given!r}")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise QueryError(f"a filter has no condition {unknown[0]!r}; choose from {', '.join(known)}")
        return cls(**given)

    def mask(
        self, rows: int, columns: Mapping[str, NDArray[Any]], class_names: Sequence[str] | None = None
    ) -> NDArray[np.bool_] | None:
        """The rows that meet all conditions, bool [rows]; None if there are no conditions.

        columns: by name, each [rows].  class_names: names of the classes 0, 1, ...

        Raises:
            QueryError: a row, class, column or condition does not exist, or no row meets the conditions.
        """
        conditions = (self.labels, self.rows, self.exclude_rows, self.where)
        if not self.correct_only and all(condition is None for condition in conditions):
            return None
        allowed = np.ones(rows, dtype=bool)
        if self.labels is not None:
            allowed &= np.isin(columns["label"], _numbers(self.labels, class_names))
        if self.correct_only:
            allowed &= columns["correct"] == True  # noqa: E712  (None, for unknown, must become False)
        if self.rows is not None:
            allowed &= _mask(rows, self.rows)
        if self.exclude_rows is not None:
            allowed &= ~_mask(rows, self.exclude_rows)
        for name, condition in (self.where or {}).items():
            allowed &= _meets(columns, name, condition, class_names)
        if not allowed.any():
            raise QueryError("the filter leaves no training row; relax its conditions")
        return allowed


def _meets(
    columns: Mapping[str, NDArray[Any]], name: str, condition: Mapping[str, Any], class_names: Sequence[str] | None
) -> NDArray[np.bool_]:
    """The rows that meet the condition on one column. bool [rows]."""
    if name not in columns:
        raise QueryError(f"the filter names column {name!r}; the index has {', '.join(columns)}")
    if not condition or not set(condition) <= {"min", "max", "in"}:
        raise QueryError(f"the filter's condition on {name} is {dict(condition)}; give one or more of min, max and in")
    values = columns[name].astype(np.float64)  # unknown: NaN, which compares false
    names = class_names if name in ("label", "prediction") else None
    met = ~np.isnan(values)
    for end, compare in (("min", np.greater_equal), ("max", np.less_equal)):
        if end in condition:
            if not isinstance(condition[end], Real):
                raise QueryError(f"min and max of the filter's condition on {name} are numbers, not {condition[end]!r}")
            met &= compare(values, float(condition[end]))
    if "in" in condition:
        _check_list(f'"in" of the condition on {name}', condition["in"])
        met &= np.isin(values, _numbers(condition["in"], names))
    return met


def _check_list(name: str, values: Any) -> None:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise QueryError(f"{name} of a filter is a list, not {values!r}")


def _numbers(values: Sequence[Label | str], class_names: Sequence[str] | None) -> list[Label]:
    """The values, with names of classes replaced by their numbers."""
    known, numbers = list(class_names or ()), list[Label]()
    for value in values:
        if isinstance(value, str):
            if value not in known:
                remedy = f"the classes are {', '.join(known)}" if known else "nothing has a name there: give numbers"
                raise QueryError(f"the filter names class {value!r}; {remedy}")
            numbers.append(known.index(value))
        elif isinstance(value, Real):
            numbers.append(value)
        else:
            raise QueryError(f"labels and values of a filter are numbers or names of classes, not {value!r}")
    return numbers


def _mask(rows: int, chosen: Sequence[int]) -> NDArray[np.bool_]:
    """bool [rows], True at the chosen rows."""
    numbers = np.asarray(list(chosen) or np.zeros(0, dtype=np.int64))
    if not np.issubdtype(numbers.dtype, np.integer):
        raise QueryError(f"rows and exclude_rows of a filter are row numbers, not {numbers.dtype} values")
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= rows):
        raise QueryError(
            f"the filter names row {numbers.min() if numbers.min() < 0 else numbers.max()}; rows are 0 to {rows - 1}"
        )
    mask = np.zeros(rows, dtype=bool)
    mask[numbers] = True
    return mask
