"""What is known of every row of a data set: label, prediction, loss and whether the prediction is correct.

Of training rows the index has it; of the query data set it is computed once for each generation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.outcomes import Outcome, outcomes
from gradtrace.task import Label
from gradtrace_service.answers.slices import Sliced
from gradtrace_service.engine.work import is_out_of_memory

Floats = NDArray[np.float64]

NAMES = ("label", "prediction", "loss", "correct")


@dataclass(frozen=True, slots=True)
class SplitRows:
    """
    present: bool [rows], False for deleted rows
    columns: by name, each [rows]; NaN where unknown
    whole: names of the columns of whole numbers
    """

    present: NDArray[np.bool_]
    columns: Mapping[str, Floats]
    whole: Collection[str]

    def label(self, name: str, row: int) -> Label | None:
        """The row's label or prediction."""
        value = float(self.columns[name][row])
        if np.isnan(value):
            return None
        return int(value) if name in self.whole else value

    def loss(self, row: int) -> float | None:
        value = float(self.columns["loss"][row])
        return None if np.isnan(value) else value

    def correct(self, row: int) -> bool | None:
        value = self.columns["correct"][row]
        return None if np.isnan(value) else bool(value)


def training_rows(
    present: NDArray[np.bool_], columns: Mapping[str, NDArray[Any]], contents: IndexContents
) -> SplitRows:
    """present, columns: of an index, with its contents"""
    whole = {name for name in ("label", "prediction") if np.issubdtype(contents.columns[name].dtype, np.integer)}
    if contents.task.class_names is not None:
        whole = {"label", "prediction"}
    return SplitRows(present, {name: column.astype(np.float64) for name, column in columns.items()}, whole)


class QueryRows(Sliced):
    """Those of the query data set. A row that the task or the model cannot take has no prediction and no loss.

    model: at the last checkpoint
    """

    def __init__(self, model: GradientModel, dataset: Any) -> None:
        super().__init__(0 if dataset is None else len(dataset))
        self._model, self._dataset = model, dataset
        self._columns = {name: np.full(self.rows, np.nan) for name in NAMES}
        self._whole = {"label", "prediction"}

    def known(self) -> SplitRows:
        return SplitRows(np.ones(self.rows, dtype=np.bool_), self._columns, self._whole)

    def compute(self, rows: range) -> None:
        for row, outcome in zip(rows, self._outcomes(rows), strict=True):
            self.keep(row, outcome)

    def keep(self, row: int, outcome: Outcome) -> None:
        for name in NAMES:
            value = getattr(outcome, name)
            self._columns[name][row] = np.nan if value is None else value
            if isinstance(value, float):
                self._whole.discard(name)

    def outcome(self, row: int) -> Outcome:
        (outcome,) = self._outcomes([row])
        return outcome

    def _outcomes(self, rows: Sequence[int]) -> list[Outcome]:
        try:
            return outcomes(self._model, fetch(self._dataset, rows))
        except Exception as error:  # whatever the user's code raises
            if len(rows) > 1:
                half = len(rows) // 2
                return self._outcomes(rows[:half]) + self._outcomes(rows[half:])
            if is_out_of_memory(error):
                raise
        return [self._label_alone(rows[0])]

    def _label_alone(self, row: int) -> Outcome:
        try:
            return Outcome(self._model.label(self._dataset[row]))
        except Exception:  # the row cannot be read
            return Outcome()
