"""Marks of training rows: setting, removing, undoing and reading them. Each function works within one transaction.

A change gives all its rows the same mark, so a mark is a row and the number of the change that says what it holds. The
number is the mark's version, too: whoever has seen it has seen this very mark.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, get_args

from gradtrace.task import Label
from gradtrace_client.state_schemas import (
    Mark,
    MarkChange,
    MarkConflict,
    MarkKind,
    MarkRequest,
    MarksAnswer,
    MarksRequest,
    UndoRequest,
    UnmarkRequest,
)
from gradtrace_service.errors import MarksConflictError, NoSuchChangeError
from gradtrace_service.state.data_sets import TrainingRows, find, find_or_add


@dataclass(frozen=True, slots=True)
class SuggestedLabel:
    """name: the class's; None: it has none"""

    label: Label | None
    name: str | None


_KEPT_CHANGES = 1_000  # of each data set: these, at least, can be undone
_COLUMNS = "m.row, c.mark, c.label, c.label_name, c.note, c.who, c.time, m.change"
_MARKS = f"SELECT {_COLUMNS} FROM marks m JOIN changes c ON c.id = m.change WHERE m.data_set = ?"


def mark(
    connection: sqlite3.Connection,
    rows: TrainingRows,
    request: MarkRequest,
    who: str | None,
    label: SuggestedLabel | None = None,
) -> MarkChange:
    """Give rows this mark, all or none.

    Raises:
        FieldError: a row does not exist.
        MarksConflictError: a mark is not as the caller has seen it.
    """
    rows.check(request.rows)
    data_set = find_or_add(connection, rows)
    current = _checked(connection, data_set, request)
    change = _new_change(connection, data_set, who, request.mark, label, request.note)
    return _apply(connection, data_set, change, current, dict.fromkeys(current, change))


def unmark(connection: sqlite3.Connection, rows: TrainingRows, request: UnmarkRequest, who: str | None) -> MarkChange:
    """Raises MarksConflictError where a mark is not as the caller has seen it."""
    data_set = find_or_add(connection, rows)
    marked = {row: version for row, version in _checked(connection, data_set, request).items() if version is not None}
    if not marked:
        return MarkChange(change=None, results=[], unmarked=[])
    return _apply(connection, data_set, _new_change(connection, data_set, who), marked, dict.fromkeys(marked))


def undo(connection: sqlite3.Connection, rows: TrainingRows, request: UndoRequest, who: str | None) -> MarkChange:
    """Give every row of a change the mark that it had before. This is a change, too, so it can be undone.

    Raises:
        NoSuchChangeError: there is no such change of this data set, or it was too long ago.
        MarksConflictError: a row was changed since.
    """
    data_set = find_or_add(connection, rows)
    steps = connection.execute(
        "SELECT row, before, after FROM row_changes JOIN changes ON id = change WHERE change = ? AND data_set = ?",
        (request.change, data_set),
    ).fetchall()
    if not steps:
        raise NoSuchChangeError(request.change)
    current = _versions(connection, data_set, [row for row, _, _ in steps])
    _refuse_conflicts(connection, data_set, [row for row, _, after in steps if current[row] != after])
    restored = {row: before for row, before, _ in steps}
    return _apply(connection, data_set, _new_change(connection, data_set, who), current, restored)


def page(connection: sqlite3.Connection, rows: TrainingRows, request: MarksRequest) -> MarksAnswer:
    counts = dict.fromkeys(get_args(MarkKind), 0)
    data_set = find(connection, rows)
    if data_set is None:
        return MarksAnswer(rows_total=0, counts=counts, results=[])
    by_kind = "SELECT mark, count(*) FROM marks WHERE data_set = ? GROUP BY mark"
    counts.update(connection.execute(by_kind, (data_set,)))
    condition, values = _condition(request)
    where = f"FROM marks m WHERE m.data_set = ?{condition}"
    (total,) = connection.execute(f"SELECT count(*) {where}", (data_set, *values)).fetchone()
    query = f"{_MARKS}{condition} ORDER BY m.row LIMIT ? OFFSET ?"
    results = [_mark(record) for record in connection.execute(query, (data_set, *values, request.k, request.offset))]
    return MarksAnswer(rows_total=total, counts=counts, results=results)


def after_row(
    connection: sqlite3.Connection, rows: TrainingRows, kind: MarkKind | None, row: int, count: int
) -> list[Mark]:
    """The next marks in the order of rows, of this kind (None: of all), beyond this row."""
    data_set = find(connection, rows)
    condition, values = (" AND m.mark = ?", [kind]) if kind is not None else ("", [])
    query = f"{_MARKS}{condition} AND m.row > ? ORDER BY m.row LIMIT ?"
    return [_mark(record) for record in connection.execute(query, (data_set, *values, row, count))]


def latest_changes(connection: sqlite3.Connection) -> dict[str, int]:
    """By index name: the number of the latest change of its marks."""
    query = "SELECT index_name, max(c.id) FROM data_sets d JOIN changes c ON c.data_set = d.id GROUP BY index_name"
    return dict(connection.execute(query))


def _condition(request: MarksRequest) -> tuple[str, list[Any]]:
    condition, values = "", list[Any]()
    if request.mark is not None:
        condition, values = condition + " AND m.mark = ?", [*values, request.mark]
    if request.rows is not None:
        chosen = " AND m.row IN (SELECT value FROM json_each(?))"
        condition, values = condition + chosen, [*values, json.dumps(request.rows)]
    return condition, values


def _mark(record: Sequence[Any]) -> Mark:
    return Mark(**dict(zip(Mark.model_fields, record, strict=True)))


def _versions(connection: sqlite3.Connection, data_set: int, rows: Sequence[int]) -> dict[int, int | None]:
    """By row, in their order, the version of its mark; None: it has none."""
    query = "SELECT row, change FROM marks WHERE data_set = ? AND row IN (SELECT value FROM json_each(?))"
    return dict.fromkeys(rows) | dict(connection.execute(query, (data_set, json.dumps(list(rows)))))


def _checked(connection: sqlite3.Connection, data_set: int, request: UnmarkRequest) -> dict[int, int | None]:
    """As `_versions`. Raises MarksConflictError where one is not as expected."""
    current = _versions(connection, data_set, request.rows)
    expected = {int(row): version or None for row, version in (request.expected or {}).items()}
    _refuse_conflicts(connection, data_set, [row for row, version in expected.items() if current[row] != version])
    return current


def _refuse_conflicts(connection: sqlite3.Connection, data_set: int, rows: Sequence[int]) -> None:
    """Raises MarksConflictError with what these rows have now, unless there are none."""
    if rows:
        there = {mark.row: mark for mark in _marks_of(connection, data_set, rows)}
        raise MarksConflictError([MarkConflict(row=row, mark=there.get(row)) for row in rows])


def _marks_of(connection: sqlite3.Connection, data_set: int, rows: Sequence[int]) -> Iterator[Mark]:
    query = f"{_MARKS} AND m.row IN (SELECT value FROM json_each(?)) ORDER BY m.row"
    return map(_mark, connection.execute(query, (data_set, json.dumps(list(rows)))))


def _new_change(
    connection: sqlite3.Connection,
    data_set: int,
    who: str | None,
    kind: MarkKind | None = None,
    label: SuggestedLabel | None = None,
    note: str | None = None,
) -> int:
    suggested = label or SuggestedLabel(None, None)
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    inserted = connection.execute(
        "INSERT INTO changes (data_set, mark, label, label_name, note, who, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (data_set, kind, suggested.label, suggested.name, note, who, now),
    )
    assert inserted.lastrowid is not None
    return inserted.lastrowid


def _apply(
    connection: sqlite3.Connection,
    data_set: int,
    change: int,
    before: Mapping[int, int | None],
    after: Mapping[int, int | None],
) -> MarkChange:
    """Give rows the marks of these changes, None: no mark, and remember how to undo it."""
    connection.executemany(
        "INSERT INTO row_changes (change, row, before, after) VALUES (?, ?, ?, ?)",
        [(change, row, before[row], version) for row, version in after.items()],
    )
    unmarked = [row for row, version in after.items() if version is None]
    connection.executemany("DELETE FROM marks WHERE data_set = ? AND row = ?", [(data_set, row) for row in unmarked])
    connection.executemany(
        "INSERT OR REPLACE INTO marks (data_set, row, mark, change) SELECT ?, ?, mark, id FROM changes WHERE id = ?",
        [(data_set, row, version) for row, version in after.items() if version is not None],
    )
    if change % _KEPT_CHANGES == 0:
        _forget_old(connection)
    marked = [row for row, version in after.items() if version is not None]
    return MarkChange(change=change, results=list(_marks_of(connection, data_set, marked)), unmarked=sorted(unmarked))


def _forget_old(connection: sqlite3.Connection) -> None:
    """Forget how to undo what is long ago, and then changes of which no mark is left."""
    for (data_set,) in connection.execute("SELECT id FROM data_sets").fetchall():
        latest = "SELECT id FROM changes WHERE data_set = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
        old = connection.execute(latest, (data_set, _KEPT_CHANGES)).fetchone()
        if old is None:
            continue
        of_old = "change IN (SELECT id FROM changes WHERE data_set = ? AND id <= ?)"
        connection.execute(f"DELETE FROM row_changes WHERE {of_old}", (data_set, *old))
        connection.execute(
            "DELETE FROM changes WHERE data_set = ? AND id <= ? AND id NOT IN (SELECT change FROM marks) AND id NOT IN "
            "(SELECT before FROM row_changes WHERE before IS NOT NULL UNION SELECT after FROM row_changes WHERE after "
            "IS NOT NULL)",
            (data_set, *old),
        )
