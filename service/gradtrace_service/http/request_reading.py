"""How a request is read: bodies are limited in size and in time, and a caller who leaves ends the handling."""

from __future__ import annotations

import asyncio
import contextlib
import time

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_service.http.body_room import BodyRoom, Contents

PATIENCE_SECONDS = 20.0
_BYTES_PER_SECOND = 16 << 10  # a slower client is refused once PATIENCE_SECONDS are used up
_LONGEST_SECONDS = 300.0  # of a whole body
_TOO_SLOW = "the body takes too long to arrive; send it again, in smaller requests where the line is slow"

_Messages = asyncio.Queue[Message | HTTPException]


class RequestReading:
    """ASGI middleware: reads the request ahead of the application, and cancels its handling when the connection is
    closed. Refuses a body that is too large, or holds too many values, with 413, as soon as its announced or received
    size says so; one that arrives too slowly with 408; and one for which there is no room with 503."""

    def __init__(self, app: ASGIApp, room: BodyRoom) -> None:
        self._app, self._room = app, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: _Messages = asyncio.Queue()
        contents = Contents(scope.get("state", {}).get("caller", ""))  # none at open addresses, whose bodies are small

        async def next_message() -> Message:
            message = await messages.get()
            if isinstance(message, HTTPException):
                raise message
            return message

        handling = asyncio.ensure_future(self._app(scope, next_message, send))
        reading = asyncio.ensure_future(self._read(scope, receive, contents, messages))
        reading.add_done_callback(lambda _: handling.cancel())
        try:
            await handling
        except asyncio.CancelledError:
            handling.cancel()  # where the server itself cancels
            if not reading.done():
                raise
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            self._room.give_back(contents)

    async def _read(self, scope: Scope, receive: Receive, contents: Contents, messages: _Messages) -> None:
        """Pass messages on until the connection is closed. A refusal is the last: the application answers with it."""
        announced = Headers(scope=scope).get("content-length", "0")
        declared, most = int(announced) if announced.isdecimal() else 0, self._room.max_bytes(scope["path"])
        pace, complete = _Pace(), False
        while True:
            try:
                message = await _in_time(receive, None if complete else pace.deadline)
                if message["type"] == "http.disconnect":
                    return
                complete = not message.get("more_body", False)
                pace.count(len(message.get("body", b"")))
                self._room.take(contents, message.get("body", b""))
                if max(contents.size, declared) > most:
                    raise HTTPException(
                        413, f"the body is larger than the {most:,} bytes that are read here; send less"
                    )
            except HTTPException as refusal:
                messages.put_nowait(refusal)
                break
            messages.put_nowait(message)
        await asyncio.Event().wait()


class _Pace:
    """Until when the next piece of a body is waited for. What is sent at once buys no more than PATIENCE_SECONDS."""

    def __init__(self) -> None:
        started = time.monotonic()
        self._latest = started + _LONGEST_SECONDS
        self.deadline = started + PATIENCE_SECONDS  # as of time.monotonic

    def count(self, size: int) -> None:
        patient = time.monotonic() + PATIENCE_SECONDS
        self.deadline = min(self.deadline + size / _BYTES_PER_SECOND, patient, self._latest)


async def _in_time(receive: Receive, deadline: float | None) -> Message:
    """deadline: as of time.monotonic; raises HTTPException there"""
    try:
        # Not asyncio.wait_for, which before Python 3.12 may lose a cancellation.
        with anyio.fail_after(None if deadline is None else deadline - time.monotonic()):
            return await receive()
    except TimeoutError:
        raise HTTPException(408, _TOO_SLOW, {"Connection": "close"}) from None
