"""What the routes of marks and questions share: the state file, the indexes' rows, and who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from sqlite3 import Connection
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from gradtrace_service.http.api_keys import ApiKey
from gradtrace_service.indexes.changes import Changes
from gradtrace_service.indexes.training_rows import RowsOf
from gradtrace_service.state.data_sets import TrainingRows
from gradtrace_service.state.database import Database

T = TypeVar("T")


class Keeping:
    """The state file, for one request. All its methods raise StateError where the file fails."""

    def __init__(self, request: Request) -> None:
        self._database: Database = request.app.state.database
        self._rows_of: RowsOf = request.app.state.rows_of
        self._changes: Changes = request.app.state.changes
        self.who = key_name(request)

    async def rows(self, index: str | None) -> TrainingRows:
        """Raises FieldError where no index has the name, and IndexUnavailableError where it cannot be read."""
        return await asyncio.to_thread(self._rows_of, index)

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """What the query returns, called with a connection and the arguments."""
        return await self._database.read(_with(query, arguments))

    async def write(self, change: Callable[..., T], *arguments: Any) -> T:
        """As `read`, once it is kept. Those who follow events are told."""
        result = await self._database.write(_with(change, arguments))
        self._changes.look()
        return result

    async def beside(self, work: Callable[..., T], *arguments: Any) -> T:
        """What the work returns, done on a thread beside the event loop's."""
        return await asyncio.to_thread(work, *arguments)


def key_of(request: Request) -> ApiKey | None:
    """The caller's key, where the service has keys."""
    key: ApiKey | None = request.state.key
    return key


def key_name(request: Request) -> str | None:
    key = key_of(request)
    return None if key is None else key.name


def _with(work: Callable[..., T], arguments: tuple[Any, ...]) -> Callable[[Connection], T]:
    return lambda connection: work(connection, *arguments)


async def _keeping(request: Request) -> Keeping:
    return Keeping(request)  # the class by itself would be called on a thread, for each request


Kept = Annotated[Keeping, Depends(_keeping)]
