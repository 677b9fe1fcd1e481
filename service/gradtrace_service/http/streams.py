"""Answers that go on: as many at a time as the service has room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.exceptions import HTTPException

_MOST = 64
_MOST_OF_A_CLIENT = 8
_LATER = {"Retry-After": "5"}


class OpenStreams:
    """By caller, as `Access` names it."""

    def __init__(self) -> None:
        self._by_caller: Counter[str] = Counter()

    def open(self, caller: str) -> None:
        """Raises HTTPException where as many are open as may be, of this caller (429) or in all (503)."""
        if self._by_caller[caller] >= _MOST_OF_A_CLIENT:
            raise HTTPException(429, f"this client has {_MOST_OF_A_CLIENT} streams open; close one of them", _LATER)
        if self._by_caller.total() >= _MOST:
            raise HTTPException(503, f"{_MOST} streams are open; ask for the job's state instead", _LATER)
        self._by_caller[caller] += 1

    def close(self, caller: str) -> None:
        self._by_caller[caller] -= 1
        self._by_caller += Counter()  # forgets callers without a stream


async def one_stream(request: Request) -> AsyncIterator[None]:
    """A dependency of routes that stream: counts the stream until its end. Raises as `OpenStreams.open`."""
    streams: OpenStreams = request.app.state.streams
    streams.open(request.state.caller)
    try:
        yield
    finally:
        streams.close(request.state.caller)
