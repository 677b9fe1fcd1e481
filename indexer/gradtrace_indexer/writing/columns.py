"""A row's label, prediction, loss, correctness and norm, stored as Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from gradtrace.models.gradient_model import Encoded
from gradtrace.store.manifest import ShardEntry
from gradtrace.store.stored_rows import joined, read_columns
from gradtrace.task import Label


class ColumnBuffer:
    """Collects label, prediction, loss, correct and norm of the rows of one shard."""

    def __init__(self) -> None:
        self._labels: list[Label | None] = []
        self._predictions: list[Label | None] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._fillers: list[int] = []

    def append(self, batch: Encoded[Any], norms: Sequence[float], labels: Mapping[int, Label | None]) -> None:
        """Add a batch of rows.

        norms: of the rows
        labels: by position in the batch. Rows without an entry are not indexed; they get the label and prediction of
            another row, so that columns of whole numbers stay such.
        """
        positions = range(len(norms))
        self._fillers += [len(self._labels) + position for position in positions if position not in labels]
        self._labels += [labels.get(position) for position in positions]
        self._predictions += [None] * len(positions) if batch.predictions is None else batch.predictions.tolist()
        self._losses += batch.losses.tolist()
        self._norms += norms

    def parquet(self) -> bytes:
        self._fill()
        correct = [  # known only where both are classes
            label == prediction if isinstance(label, int) and isinstance(prediction, int) else None
            for label, prediction in zip(self._labels, self._predictions, strict=True)
        ]
        table = pyarrow.table(
            {
                "label": _numbers(self._labels),
                "prediction": _numbers(self._predictions),
                "loss": pyarrow.array(self._losses, pyarrow.float32()),
                "correct": pyarrow.array(correct, pyarrow.bool_()),
                "norm": pyarrow.array(self._norms, pyarrow.float32()),
            }
        )
        return _content(table)

    def _fill(self) -> None:
        others = set(range(len(self._labels))) - set(self._fillers)
        if self._fillers and others:
            known = min(others)
            for row in self._fillers:
                self._labels[row], self._predictions[row] = self._labels[known], self._predictions[known]


def gathered(directory: Path, sources: Sequence[tuple[ShardEntry, NDArray[np.int64]]]) -> bytes:
    """The content of one column file with these rows of several shards, in order. Raises as `read_columns`."""
    return _content(joined([read_columns(directory, shard).take(rows) for shard, rows in sources]).combine_chunks())


def _content(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def _numbers(values: Sequence[Label | None]) -> Any:
    whole = all(value is None or isinstance(value, int) for value in values)
    return pyarrow.array(values, pyarrow.int64() if whole else pyarrow.float64())
