"""The features of tables, by their names: of the ready-made tasks, and of those that render {"features": {...}}."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.task import Task
from gradtrace.tasks.hooks import rendered
from gradtrace.tasks.tabular import TabularClassification, TabularRegression

_LOOKED_AT = 3  # rows, as one may fail

_LONGITUDES, _LATITUDES = {"longitude", "long", "lon", "lng"}, {"latitude", "lat"}

TabularTask = TabularClassification | TabularRegression
Cells = NDArray[Any] | list[Any]


def as_table(task: Task) -> TabularTask | None:
    return task if isinstance(task, TabularClassification | TabularRegression) else None


def in_memory(task: Task, dataset: Any) -> bool:
    """Whether features of all rows are at hand."""
    table = as_table(task)
    return table is not None and table.in_memory(dataset)


def feature_names(task: Task, dataset: Any, rows: NDArray[np.int64]) -> list[str]:
    """rows: int64 [rows] that the data set has; the first are rendered to find the names"""
    table = as_table(task)
    if table is not None:
        return list(table.feature_names)
    renderings = (_rendered_features(task, dataset, row) for row in rows[:_LOOKED_AT].tolist())
    return list(dict.fromkeys(name for rendering in renderings for name in rendering))


def feature_cells(task: Task, dataset: Any, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, Cells]:
    """The values of some features: floating-point [rows], NaN where unknown, or words and values, None where unknown.

    rows: int64 [rows]
    """
    table = as_table(task)
    if table is None:
        renderings = [_rendered_features(task, dataset, row) for row in rows.tolist()]
        return {name: [_cell(rendering.get(name)) for rendering in renderings] for name in names}
    values = table.table(dataset, rows)
    return {name: _column(table, name, values[:, table.feature_names.index(name)]) for name in names}


def coordinates(task: Task) -> tuple[str, str] | None:
    """The names of the features that place a row on a map: x, y."""
    table = as_table(task)
    numbers = [] if table is None else [name for name in table.feature_names if name not in table.categories]
    x = next((name for name in numbers if name.casefold() in _LONGITUDES), None)
    y = next((name for name in numbers if name.casefold() in _LATITUDES), None)
    return None if x is None or y is None else (x, y)


def _column(task: TabularTask, name: str, values: NDArray[np.float32]) -> Cells:
    words = task.categories.get(name)
    return values.astype(np.float64) if words is None else [words[int(value)] for value in values]


def _rendered_features(task: Task, dataset: Any, row: int) -> dict[str, Any]:
    try:
        features = rendered(task, dataset[row]).get("features")
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception:  # whatever the user's code raises
        features = None
    return features if isinstance(features, dict) else {}


def _cell(value: Any) -> float | str | None:
    if isinstance(value, str):
        return value
    with suppress(OverflowError):  # an integer of hundreds of digits
        return float(value) if isinstance(value, int | float) else None
    return None
