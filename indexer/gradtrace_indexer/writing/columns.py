"""What is stored of each row beside its gradient, as Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.task import Label


class ColumnBuffer:
    """Collects label, prediction, loss, correct and norm of the rows of one shard."""

    def __init__(self) -> None:
        self._labels: list[Label | None] = []
        self._predictions: list[Label | None] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._fillers: list[int] = []

    def append(
        self,
        labels: Sequence[Label | None],
        predictions: Tensor | None,
        losses: Tensor,
        norms: Tensor,
        fillers: Sequence[int] = (),
    ) -> None:
        """One batch; each [batch].

        fillers: positions of rows that are not indexed; they get the label and prediction of another, so that columns
            of whole numbers stay such
        """
        self._fillers += [len(self._labels) + position for position in fillers]
        self._labels += labels
        self._predictions += [None] * len(labels) if predictions is None else predictions.tolist()
        self._losses += losses.tolist()
        self._norms += norms.tolist()

    def parquet(self) -> bytes:
        self._fill()
        pairs = zip(self._labels, self._predictions, strict=True)
        table = pyarrow.table(
            {
                "label": _numbers(self._labels),
                "prediction": _numbers(self._predictions),
                "loss": pyarrow.array(self._losses, pyarrow.float32()),
                "correct": pyarrow.array([_correct(*pair) for pair in pairs], pyarrow.bool_()),
                "norm": pyarrow.array(self._norms, pyarrow.float32()),
            }
        )
        return _written(table)

    def _fill(self) -> None:
        others = set(range(len(self._labels))) - set(self._fillers)
        if self._fillers and others:
            known = min(others)
            for row in self._fillers:
                self._labels[row], self._predictions[row] = self._labels[known], self._predictions[known]


def gathered(parts: Sequence[tuple[Path, NDArray[np.int64]]]) -> bytes:
    """Some rows of several column files, in order, as one."""
    tables = []
    for path, rows in parts:
        with pyarrow.parquet.ParquetFile(path) as file:
            tables.append(file.read().take(rows))
    return _written(pyarrow.concat_tables(tables, promote_options="permissive").combine_chunks())


def _written(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def _numbers(values: Sequence[Label | None]) -> Any:
    whole = all(value is None or isinstance(value, int) for value in values)
    return pyarrow.array(values, pyarrow.int64() if whole else pyarrow.float64())


def _correct(label: Label | None, prediction: Label | None) -> bool | None:
    """Known only where both are classes."""
    return label == prediction if isinstance(label, int) and isinstance(prediction, int) else None
