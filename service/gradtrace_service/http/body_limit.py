"""Limits on the size of request bodies, and on the time to send them."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_service.http import slow_clients

_TOO_SLOW = "the body takes too long to arrive; send it again, in smaller requests where the line is slow"


class BodyLimit:
    """ASGI middleware: a body above `max_bytes` is refused with 413, as soon as it is announced or has grown to it, and
    one that a slow client sends with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        declared = int(announced) if announced.isdecimal() else 0
        started, counted, whole = time.monotonic(), 0, False

        async def limited() -> Message:
            nonlocal counted, whole
            if whole:  # what comes next is that the client leaves
                return await receive()
            left = started + slow_clients.seconds_for(counted) - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise HTTPException(408, _TOO_SLOW, {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            counted += len(message.get("body", b""))
            if max(counted, declared) > self._max_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_bytes:,} bytes; send less at a time")
            return message

        await self._app(scope, limited, send)
