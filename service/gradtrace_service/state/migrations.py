"""The tables of the state file, and how a file of an earlier release gets them.

`PRAGMA user_version` is the number of migrations that a file has had. A migration that was released is never changed.
"""

from __future__ import annotations

import sqlite3

from gradtrace_service.errors import StateUnavailableError

APPLICATION_ID = 0x47726164  # "Grad", in the file's header

_MARKS = (
    # Indexes of one name may have been built from different data sets, one after the other.
    """CREATE TABLE data_sets (
        id INTEGER PRIMARY KEY,
        index_name TEXT NOT NULL,
        identity TEXT NOT NULL
    )""",
    "CREATE INDEX data_sets_by_index ON data_sets (index_name)",
    # What a request made of all its rows; mark is null where it took marks away, or restored earlier ones.
    """CREATE TABLE changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        data_set INTEGER NOT NULL REFERENCES data_sets,
        mark TEXT, label, label_name TEXT, note TEXT, who TEXT,
        time TEXT NOT NULL
    )""",
    "CREATE INDEX changes_by_data_set ON changes (data_set, id)",
    # `change` says what the mark holds, and is its version.
    """CREATE TABLE marks (
        data_set INTEGER NOT NULL REFERENCES data_sets,
        row INTEGER NOT NULL,
        mark TEXT NOT NULL,
        change INTEGER NOT NULL REFERENCES changes,
        PRIMARY KEY (data_set, row)
    ) WITHOUT ROWID""",
    "CREATE INDEX marks_by_kind ON marks (data_set, mark, row)",
    "CREATE INDEX marks_by_change ON marks (change)",
    # For undoing: the version of each row's mark before and after a change; null: no mark.
    """CREATE TABLE row_changes (
        change INTEGER NOT NULL REFERENCES changes,
        row INTEGER NOT NULL,
        before INTEGER REFERENCES changes,
        after INTEGER REFERENCES changes,
        PRIMARY KEY (change, row)
    ) WITHOUT ROWID""",
    "CREATE INDEX row_changes_by_before ON row_changes (before)",
    "CREATE INDEX row_changes_by_after ON row_changes (after)",
)
_QUESTIONS = (
    """CREATE TABLE questions (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL, address TEXT NOT NULL, note TEXT, who TEXT,
        time TEXT NOT NULL
    )""",
)
_JOBS = (
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE, directory TEXT NOT NULL, job TEXT NOT NULL
    )""",
    "CREATE INDEX jobs_by_directory ON jobs (directory, number)",
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_MARKS, _QUESTIONS, _JOBS)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables up to date, all at once or not at all, also where several services do so at a time.

    Raises:
        StateUnavailableError: the file is of a later release, or of another program.
        sqlite3.Error: it is damaged, or cannot be written.
    """
    if known_version(connection) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in MIGRATIONS[known_version(connection) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk ends it
            connection.execute("ROLLBACK")
        raise


def known_version(connection: sqlite3.Connection) -> int:
    """The number of migrations that the file has had.

    Raises:
        StateUnavailableError: the file is of a later release, or of another program.
        sqlite3.Error: it is damaged.
    """
    application, version = (_value(connection, f"PRAGMA {name}") for name in ("application_id", "user_version"))
    empty = not _value(connection, "SELECT count(*) FROM sqlite_schema")
    if application != APPLICATION_ID and not empty:
        raise StateUnavailableError("it is the database of another program: give another file by --state")
    if version > len(MIGRATIONS):
        raise StateUnavailableError(
            f"a later release of Gradtrace wrote it (it has had {version} migrations, this release knows "
            f"{len(MIGRATIONS)}): use that release, or give another file by --state"
        )
    return version


def _value(connection: sqlite3.Connection, query: str) -> int:
    value: int = connection.execute(query).fetchone()[0]
    return value
