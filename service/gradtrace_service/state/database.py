"""The state file: one connection on one thread, so that no request waits for the disk but those that ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from gradtrace_service.errors import StateBusyError, StateError, StateFullError, StateUnavailableError
from gradtrace_service.state.migrations import known_version, migrate

T = TypeVar("T")

_WAIT_SECONDS = 5.0  # for another service that writes to the file
_POLL_SECONDS = 0.05
_MOST_WAITING = 256  # requests

_log = logging.getLogger(__name__)


class Database:
    """An SQLite file in WAL mode, opened when it is first needed and made when it is first written to.

    What `write` has returned from is on the disk: neither the end of the process nor a power failure loses it. Several
    services may use one file. A file that fails is opened again for the next request.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, "gradtrace-state")
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the open file
        self._empty: sqlite3.Connection | None = None  # stands for a file that is not there yet
        self._read_only = False  # the open file cannot be written to
        self._waiting = 0
        self._complaint = ""  # the last error that was logged

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """What the query returns; all of it sees the file at one moment. Without a file, it sees empty tables.

        Raises:
            StateError: the file cannot be read.
        """
        return await self._run(lambda: self._transaction("BEGIN", query, self._reading()), writes=False)

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """What the change returns, once it is on the disk. What it raises leaves the file as it was.

        Raises:
            StateError: the file cannot be written.
        """
        return await self._run(lambda: self._transaction("BEGIN IMMEDIATE", change, self._writing()), writes=True)

    async def is_read_only(self) -> bool:
        """Whether a change would fail now, as far as can be told without one."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._lacks_permission)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], T], writes: bool) -> T:
        if self._waiting >= _MOST_WAITING:
            raise StateBusyError(
                "too many requests wait for the file of marks and questions; send this one again later"
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, work, writes)
        finally:
            self._waiting -= 1

    def _attempt(self, work: Callable[[], T], writes: bool) -> T:
        try:
            result = work()
        except StateError as refusal:
            self._complain(refusal)
            raise
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # a defect, not the file's
            raise
        except (OSError, sqlite3.DatabaseError, ValidationError, JSONDecodeError) as error:
            self._close()
            told = _refusal(error, writes)
            self._complain(told)
            raise told from error
        if self._read_only:  # another service may write to it, which is seen only by who opens it anew
            self._close()
        self._complaint = ""
        return result

    def _complain(self, refusal: StateError) -> None:
        if str(refusal) != self._complaint and not isinstance(refusal, StateBusyError):
            _log.error("the state file %s: %s", self.path, refusal)
            self._complaint = str(refusal)

    def _transaction(self, begin: str, work: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
        connection.execute(begin)
        try:
            result = work(connection)
            connection.execute("COMMIT")
            return result
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk may have ended it already
                connection.execute("ROLLBACK")
            raise

    def _reading(self) -> sqlite3.Connection:
        if self._connection is not None or os.path.lexists(self.path):
            return self._opened()
        if self._empty is None:
            self._empty = sqlite3.connect(":memory:", isolation_level=None)
            migrate(self._empty)
        return self._empty

    def _writing(self) -> sqlite3.Connection:
        connection = self._opened()
        if self._read_only:
            raise StateUnavailableError("it is read-only: let the service write to it and to its folder")
        return connection

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._open_patiently()
            self._inode = _inode(self.path)
        elif _inode(self.path) != self._inode:  # what is written now would be in no file that has a name
            raise StateUnavailableError("it was removed or replaced while the service used it: restart the service")
        return self._connection

    def _open_patiently(self) -> sqlite3.Connection:
        """Two services that make the file at a time may meet in a lock that SQLite does not wait for."""
        until = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                return self._open()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(_POLL_SECONDS)

    def _open(self) -> sqlite3.Connection:
        _check_regular(self.path)
        self._read_only = self._lacks_permission() and self.path.exists()
        if not self._read_only:
            with contextlib.suppress(FileExistsError):  # notes are for the service's callers alone
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        # Without a log beside it nobody writes to it now; SQLite would have to make one even to read.
        unused = not self.path.with_name(f"{self.path.name}-wal").exists()
        mode = "mode=rw" if not self._read_only else "mode=ro&immutable=1" if unused else "mode=ro"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            _WAIT_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # it is closed by whoever drops it last
            uri=True,
        )
        try:
            _prepare(connection, self._read_only)
        except BaseException:
            connection.close()
            raise
        return connection

    def _lacks_permission(self) -> bool:
        places = [self.path, self.path.parent] if self.path.exists() else [self.path.parent]  # WAL is beside it
        effective = os.access in os.supports_effective_ids
        return not all(os.access(place, os.W_OK, effective_ids=effective) for place in places)

    def _close(self) -> None:
        for connection in (self._connection, self._empty):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
        self._connection = self._empty = None


def _prepare(connection: sqlite3.Connection, read_only: bool) -> None:
    """Raises sqlite3.Error where the file is damaged, and as `migrate`."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    known_version(connection)  # before anything is changed in a file of others
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    migrate(connection)
    connection.execute("PRAGMA foreign_keys = ON")
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)


def _check_regular(path: Path) -> None:
    """Raises StateUnavailableError for a folder, a pipe, or a link to nowhere."""
    if os.path.lexists(path) and not (path.exists() and stat.S_ISREG(path.stat().st_mode)):
        raise StateUnavailableError("it is not a regular file: give another one by --state")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refusal(error: Exception, writes: bool) -> StateError:
    """What callers are told of an error of the file; its path is for the log alone."""
    if isinstance(error, ValidationError | JSONDecodeError):
        return StateUnavailableError("it holds what was never kept in it; restore it from a copy")
    text = error.strerror or "" if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StateFullError(f"it cannot be written: {text}")
    if "locked" in text:
        return StateBusyError(
            "another service is writing to the file of marks and questions; send this one again later"
        )
    if "full" in text or (writes and "disk I/O error" in text):
        return StateFullError(f"it cannot be written: {text}")
    if "readonly" in text:
        return StateUnavailableError("it is read-only: let the service write to it and to its folder")
    return StateUnavailableError(f"it cannot be used: {text}; restore it from a copy, or give another file by --state")
