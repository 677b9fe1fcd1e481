"""Row ids: the training row at each position of an index's store.

A stored row has a position in the shards, and an id, its number in task.train. Ids never change; positions change when
compaction removes deleted rows. Stores and searchers use positions, answers use ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError, QueryError
from gradtrace.store.index_files import check_file
from gradtrace.store.manifest import FileEntry, Manifest
from gradtrace.store.regular_files import regular_path

Ids = NDArray[np.int64]


class RowIds:
    """The ids of an index's stored rows, and which of them are deleted.

    rows: number of training rows; ids are below it
    present: bool [rows], whether a training row is stored and not deleted
    ids: int64 [stored rows], the id at each position, ascending
    deleted: int64 [n], ids of stored rows that are deleted, ascending
    """

    def __init__(self, rows: int, ids: Ids, deleted: Ids) -> None:
        self.rows = rows
        self.present = np.zeros(rows, dtype=np.bool_)
        self.present[ids] = True
        self.present[deleted] = False
        self.ids, self.deleted = ids, deleted
        self._identity = len(ids) == rows and not len(deleted)  # positions are ids, and nothing is deleted

    def live(self) -> NDArray[np.bool_]:
        """Which positions hold rows that are not deleted. bool [stored rows]."""
        return self.present[self.ids]

    def live_ids(self) -> Ids:
        """Ids of the stored rows that are not deleted, ascending."""
        return self.ids[self.live()]

    def allowed(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """The positions that a search may return. bool [stored rows]; None: all.

        mask: bool [rows], the ids that a filter admits; None: all

        Raises:
            QueryError: the filter admits deleted rows only.
        """
        if self._identity:
            return mask
        allowed = self.live() if mask is None else (mask & self.present)[self.ids]
        if not allowed.any():
            raise QueryError("the filter leaves no training row but deleted ones; relax it")
        return allowed

    def spread(self, values: NDArray[np.float32], deleted: float) -> NDArray[np.float32]:
        """Values by position to values by id. [..., stored rows] -> [..., rows].

        deleted: the value of deleted rows
        """
        if self._identity:
            return values
        out = np.full((*values.shape[:-1], self.rows), deleted, dtype=np.float32)
        live = self.live()
        out[..., self.live_ids()] = values[..., live]
        return out

    def columns(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns by position, [stored rows], to columns by id, [rows]. Deleted rows get NaN as numbers, else None."""
        if self._identity:
            return dict(columns)
        live, live_ids, by_id = self.live(), self.live_ids(), dict[str, NDArray[Any]]()
        for name, column in columns.items():
            numbers = np.issubdtype(column.dtype, np.number)
            kind = np.result_type(column, np.float32) if numbers else np.dtype(object)
            by_id[name] = np.full(self.rows, np.nan if numbers else None, dtype=kind)
            by_id[name][live_ids] = column[live]
        return by_id


def read_row_ids(directory: Path, manifest: Manifest) -> RowIds:
    """The ids of a generation's rows.

    Raises:
        CorruptIndexError: a file of ids is missing or does not fit the manifest.
    """
    rows = manifest.task.train_rows
    _check_shards(directory, manifest)
    ids = np.arange(manifest.rows) if manifest.row_ids is None else _read(directory, manifest.row_ids)
    deleted = ids[:0] if manifest.deleted is None else _read(directory, manifest.deleted)
    ascending = all((np.diff(values) > 0).all() for values in (ids, deleted))
    known = ((ids >= 0) & (ids < rows)).all() and np.isin(deleted, ids).all()
    if not ascending or not known or len(ids) != manifest.rows:
        raise CorruptIndexError(
            f"the row ids of {directory} do not fit its manifest: restore the index, or roll back to an earlier "
            "generation"
        )
    return RowIds(rows, ids, deleted)


def _check_shards(directory: Path, manifest: Manifest) -> None:
    """Raises CorruptIndexError where the rows of the manifest are not on the disk: ids of as many would fill memory."""
    for shard in manifest.shards if manifest.complete else ():
        if shard.checkpoint == 0 and (problem := check_file(directory, shard.rows, deep=False)) is not None:
            raise CorruptIndexError(f"{directory} is damaged: {problem}. Restore the file, or rebuild the index")


def _read(directory: Path, entry: FileEntry) -> Ids:
    path = regular_path(directory, entry.path)
    try:
        return np.frombuffer(path.read_bytes(), dtype="<i8").astype(np.int64)
    except (OSError, ValueError) as error:
        raise CorruptIndexError(f"{path} cannot be read: {error}; restore it or rebuild the index") from error
