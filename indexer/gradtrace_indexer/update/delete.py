"""Delete rows: no answer names them from the next generation on; `compact` reclaims their space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradtrace.errors import QueryError
from gradtrace.fingerprint import without_probes
from gradtrace.store.manifest import Manifest
from gradtrace.store.row_ids import Ids, RowIds, read_row_ids
from gradtrace_indexer.generations import publish, successor, updating
from gradtrace_indexer.writing.files import write_ids


def delete_rows(path: str | Path, rows: Sequence[int]) -> Manifest:
    """Publish a generation without these rows; rows that are deleted already may be among them.

    The other rows keep their ids, so task.train must keep its length: leave the deleted examples in, or put others in
    their place.

    Returns:
        the current manifest.

    Raises:
        QueryError: a row that the index never had, or no row would be left.
        StoreError: no index, an update unfinished or running, or a full disk.
    """
    directory = Path(path)
    with updating(directory, "delete rows") as (current, _):
        ids = read_row_ids(directory, current)
        deleted = np.union1d(ids.deleted, np.intersect1d(_checked(rows, ids), ids.ids))
        if len(deleted) == len(ids.deleted):
            return current
        if len(deleted) == len(ids.ids):
            raise QueryError(f"no row of {directory} would be left; remove the directory if that is meant")
        after = successor(current, "delete rows")
        entry = write_ids(directory, f"deleted/{after.generation}.ids", deleted)
        task = without_probes(current.task, deleted.tolist())
        return publish(directory, after.model_copy(update={"deleted": entry, "task": task}))


def _checked(rows: Sequence[int], ids: RowIds) -> Ids:
    numbers = np.asarray(list(rows) or np.zeros(0, dtype=np.int64))
    if not np.issubdtype(numbers.dtype, np.integer):
        raise QueryError(f"rows are row numbers, not {numbers.dtype} values")
    unknown = numbers[(numbers < 0) | (numbers >= ids.rows)]
    if len(unknown):
        raise QueryError(f"there is no row {unknown[0]} to delete; rows of this index are 0 to {ids.rows - 1}")
    return numbers.astype(np.int64)
