"""What an example of a request looks like, of the ready-made tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradtrace import Task
from gradtrace.tasks import CausalLM, ImageClassification, SequenceClassification, TextClassification
from gradtrace.tasks.features import TabularTask, as_table
from gradtrace_client.schemas import Feature, FeaturesInput, ImageInput, OtherInput, TextInput

READ_ROWS = 2_000  # at most, where a data set is read row by row
_MOST_ROWS = 100_000  # that ranges are from

Input = ImageInput | TextInput | FeaturesInput | OtherInput | None


def input_of(task: Task, present: NDArray[np.bool_]) -> Input:
    """present: bool [rows], the training rows that are not deleted"""
    rows = np.flatnonzero(present)
    if isinstance(task, ImageClassification):
        channels, height, width = task.train[int(rows[0])][0].shape
        return ImageInput(height=height, width=width, channels=channels)
    if isinstance(task, TextClassification):
        return TextInput() if task.encode is not None else OtherInput()
    if isinstance(task, CausalLM | SequenceClassification):
        return TextInput()
    if (table := as_table(task)) is not None:
        return FeaturesInput(features=_features(table, rows))
    return None if type(task).parse is Task.parse else OtherInput()


def _features(task: TabularTask, rows: NDArray[np.int64]) -> list[Feature]:
    table = task.table(task.train, evenly(rows, _MOST_ROWS if task.in_memory(task.train) else READ_ROWS))
    return [_feature(task, name, column) for name, column in zip(task.feature_names, table.T, strict=True)]


def _feature(task: TabularTask, name: str, column: NDArray[np.float32]) -> Feature:
    """column: [rows], NaN where missing"""
    choices, values = task.categories.get(name), column[~np.isnan(column)]
    known = choices is None and len(values) > 0
    low, high, median = (float(str(f(values))) if known else None for f in (np.min, np.max, np.median))
    return Feature(
        name=name,
        min=low,
        max=high,
        median=median,
        integer=known and bool((values == np.round(values)).all()),
        choices=choices,
        optional=name in task.fill,
    )


def evenly(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    chosen: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
    return chosen
