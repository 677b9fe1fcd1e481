"""Which data set marks belong to: row 17 of one data set says nothing about row 17 of another.

An index is known by its name, and its data set by the fingerprint of its task: content hashes of some rows (the probe).
The probe changes when rows are appended or deleted, so of each data set all probes that were seen are kept, and the
files of the basis, which stay for an index's life.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradtrace.store.manifest import Manifest
from gradtrace_service.errors import FieldError

_MOST_PROBES = 512
_MOST_BASES = 64


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """The training rows of an index's current generation.

    index: the index's name, empty where it has none
    present: bool [rows], False for rows that were deleted
    probes: by row, the content hash of its example;  bases: checksums of the basis's files
    """

    index: str
    generation: int
    present: NDArray[np.bool_]
    probes: dict[str, str]
    bases: list[str]

    @classmethod
    def of(cls, index: str, manifest: Manifest, present: NDArray[np.bool_]) -> TrainingRows:
        probe = manifest.task.probe
        probes = {str(row): sha256 for row, sha256 in zip(probe.rows, probe.sha256, strict=True)}
        return cls(index, manifest.generation, present, probes, [file.xxh3 for file in manifest.basis.files])

    def check(self, rows: list[int]) -> None:
        """Raises FieldError for a row that does not exist or was deleted."""
        for position, row in enumerate(rows):
            if row >= len(self.present):
                detail = f"there is no row {row} in the training data; its rows are 0 to {len(self.present) - 1}"
                raise FieldError(f"rows[{position}]", detail)
            if not self.present[row]:
                raise FieldError(f"rows[{position}]", f"row {row} of the training data is not in the index any more")


def find(connection: sqlite3.Connection, rows: TrainingRows) -> int | None:
    """The id of the data set, as `marks` uses it; None: nothing was ever kept about it."""
    known = connection.execute(
        "SELECT id, identity FROM data_sets WHERE index_name = ? ORDER BY id DESC", (rows.index,)
    )
    return next((number for number, identity in known if _is_same(json.loads(identity), rows)), None)


def find_or_add(connection: sqlite3.Connection, rows: TrainingRows) -> int:
    """As `find`, in a transaction that writes: what the index is known by from now on is kept, too."""
    number = find(connection, rows)
    if number is None:
        inserted = connection.execute(
            "INSERT INTO data_sets (index_name, identity) VALUES (?, ?)", (rows.index, _identity([], {}, rows))
        )
        assert inserted.lastrowid is not None
        return inserted.lastrowid
    (text,) = connection.execute("SELECT identity FROM data_sets WHERE id = ?", (number,)).fetchone()
    known = json.loads(text)
    identity = _identity(known["bases"], known["probes"], rows)
    if identity != text:
        connection.execute("UPDATE data_sets SET identity = ? WHERE id = ?", (identity, number))
    return number


def _is_same(known: dict[str, dict[str, str]], rows: TrainingRows) -> bool:
    shared = known["probes"].keys() & rows.probes.keys()
    if any(known["probes"][row] != rows.probes[row] for row in shared):
        return False
    return bool(shared) or bool(set(known["bases"]) & set(rows.bases))


def _identity(bases: list[str], probes: dict[str, str], rows: TrainingRows) -> str:
    """What was known and what is new, as JSON; of very much the latest."""
    all_bases = [*bases, *(base for base in rows.bases if base not in bases)]
    all_probes = list((probes | rows.probes).items())
    return json.dumps({"bases": all_bases[-_MOST_BASES:], "probes": dict(all_probes[-_MOST_PROBES:])})
