"""How a request is read: bodies are limited in size and in time, and a caller who leaves ends the handling."""

from __future__ import annotations

import asyncio
import contextlib
import time

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE_SECONDS = 20.0
_BYTES_PER_SECOND = 16 << 10  # a slower client is refused once PATIENCE_SECONDS are used up
_TOO_SLOW = "the body takes too long to arrive; send it again, in smaller requests where the line is slow"

_Messages = asyncio.Queue[Message | HTTPException]


class RequestReading:
    """ASGI middleware: reads the request ahead of the application, and cancels its handling when the connection is
    closed. Refuses a body above `max_bytes` with 413, as soon as its announced or received size exceeds that, and one
    that arrives too slowly with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: _Messages = asyncio.Queue()

        async def next_message() -> Message:
            message = await messages.get()
            if isinstance(message, HTTPException):
                raise message
            return message

        handling = asyncio.ensure_future(self._app(scope, next_message, send))
        reading = asyncio.ensure_future(self._read(Headers(scope=scope), receive, messages))
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

    async def _read(self, headers: Headers, receive: Receive, messages: _Messages) -> None:
        """Pass messages on until the connection is closed. A refusal is the last: the application answers with it."""
        announced = headers.get("content-length", "0")
        declared = int(announced) if announced.isdecimal() else 0
        started, counted, complete = time.monotonic(), 0, False
        while True:
            deadline = started + PATIENCE_SECONDS + counted / _BYTES_PER_SECOND
            try:
                # Not asyncio.wait_for, which before Python 3.12 may lose a cancellation.
                with anyio.fail_after(None if complete else deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                messages.put_nowait(HTTPException(408, _TOO_SLOW, {"Connection": "close"}))
                break
            if message["type"] == "http.disconnect":
                return
            complete = not message.get("more_body", False)
            counted += len(message.get("body", b""))
            if max(counted, declared) > self._max_bytes:
                detail = f"the body is larger than {self._max_bytes:,} bytes; send less at a time"
                messages.put_nowait(HTTPException(413, detail))
                break
            messages.put_nowait(message)
        await asyncio.Event().wait()
