"""What all kinds of rows have: their numbers, their columns (label, loss ...), and shards at every checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.store.manifest import Manifest, ShardEntry
from gradtrace.store.regular_files import regular_path
from gradtrace.store.row_ids import RowIds, read_row_ids

_COLUMNS = {"label", "prediction", "loss", "correct", "norm"}


class StoredRows(ABC):
    """The rows of an index, or a window of them. Not thread-safe.

    A row is named by its position in the store; `row_ids` has the training row at each position of the whole index.

    rows: number of stored rows
    checkpoints: number of checkpoints
    """

    def __init__(self, directory: Path, manifest: Manifest, window: range | None = None) -> None:
        """window: consecutive rows of the index that this store is limited to, and counts from 0; None: all

        Raises CorruptIndexError unless the shards of every checkpoint tile the rows in the same stretches.
        """
        self.rows, self.checkpoints = manifest.rows, len(manifest.checkpoints)
        self._directory, self._manifest = directory, manifest
        self._entries = [
            sorted((s for s in manifest.shards if s.checkpoint == c), key=lambda s: s.start)
            for c in range(self.checkpoints)
        ]
        stretches = manifest.stretches()
        self._check_stretches(stretches)
        self._limit(stretches, range(self.rows) if window is None else window)

    def _limit(self, stretches: list[tuple[int, int]], window: range) -> None:
        """Leave out the shards that have no row of the window."""
        used = [n for n, (start, stop) in enumerate(stretches) if start < window.stop and stop > window.start]
        self.rows = len(window)
        self._entries = [[entries[number] for number in used] for entries in self._entries]
        starts = [max(stretches[number][0], window.start) - window.start for number in used]
        self._starts = np.array(starts, dtype=np.int64)
        self._cuts = [_cut(*stretches[number], window) for number in used]  # of each shard, the rows in the window

    @abstractmethod
    def open_all(self) -> None:
        """Open every shard now: an open shard stays readable even if its file is deleted."""

    @abstractmethod
    def norms(self, checkpoint: int) -> NDArray[np.float32]:
        """The Euclidean norm of each row. float32 [rows]."""

    @cached_property
    def row_ids(self) -> RowIds:
        """The training row at each position. Raises CorruptIndexError."""
        return read_row_ids(self._directory, self._manifest)

    def _check_stretches(self, stretches: list[tuple[int, int]]) -> None:
        """Raises CorruptIndexError unless every checkpoint has shards of these rows (start, stop), which tile all."""
        edges = [0, *(stop for _, stop in stretches)]
        tiled = edges[:-1] == [start for start, _ in stretches] and edges[-1] == self.rows
        for checkpoint, entries in zip(self._manifest.checkpoints, self._entries, strict=True):
            if not tiled or [(entry.start, entry.stop) for entry in entries] != stretches:
                raise CorruptIndexError(
                    f"the shards of checkpoint {checkpoint.name} do not cover its {self.rows} rows in the same "
                    f"stretches as those of the first checkpoint: rebuild {self._directory}"
                )

    def columns(self, checkpoint: int) -> dict[str, NDArray[Any]]:
        """label, prediction, loss, correct and norm of every row at a checkpoint, each [rows].

        An integer column with nulls becomes float64 with NaN; a boolean one, objects with None.

        Raises:
            CorruptIndexError: a file is missing, is not Parquet, or does not hold the columns of these rows.
        """
        cuts = zip(self._entries[checkpoint], self._cuts, strict=True)
        tables = [read_columns(self._directory, entry).slice(cut.start, cut.stop - cut.start) for entry, cut in cuts]
        table = joined(tables) if tables else pyarrow.table({})
        return {name: table.column(name).to_numpy() for name in table.column_names}


def _cut(start: int, stop: int, window: range) -> slice:
    """Which rows of a shard, counted from its first, are in a window of the index's rows."""
    return slice(max(window.start - start, 0), min(window.stop, stop) - start)


def read_columns(directory: Path, shard: ShardEntry) -> pyarrow.Table:
    """label, prediction, loss, correct and norm of a shard's rows.

    Raises:
        CorruptIndexError: the file is missing, is not Parquet, or does not hold the columns of these rows.
    """
    path, rows = regular_path(directory, shard.columns.path), shard.stop - shard.start
    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table would import pyarrow.dataset (0.4 s)
            whole = file.metadata.num_rows == rows  # before memory is taken for as many
            table = file.read() if whole else pyarrow.table({})
    except (OSError, pyarrow.ArrowException) as error:
        raise CorruptIndexError(f"{path} cannot be read: {error}; restore it or rebuild the index") from error
    whole = whole and table.num_rows == rows and set(table.column_names) == _COLUMNS
    if not whole or not all(map(_is_number, table.schema.types)):
        raise CorruptIndexError(f"{path} does not hold the columns of {rows} rows; restore it or rebuild the index")
    return table


def joined(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """One after the other. Raises CorruptIndexError where a column has types that do not go together."""
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise CorruptIndexError(f"the columns of the shards do not fit together: {error}; rebuild the index") from error


def _is_number(kind: pyarrow.DataType) -> bool:
    """Also the type of a column without any value."""
    types = pyarrow.types
    return any(is_kind(kind) for is_kind in (types.is_floating, types.is_integer, types.is_boolean, types.is_null))
