"""Limits on the size of request bodies, and on the time to send them."""

from __future__ import annotations

import time

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE_SECONDS = 20.0
_BYTES_PER_SECOND = 16 << 10  # a slower client is refused once PATIENCE_SECONDS are used up
_TOO_SLOW = "the body takes too long to arrive; send it again, in smaller requests where the line is slow"


class BodyLimit:
    """ASGI middleware: refuses a body above `max_bytes` with 413, as soon as its announced or received size exceeds
    that, and one that arrives too slowly with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        declared = int(announced) if announced.isdecimal() else 0
        started, counted, complete = time.monotonic(), 0, False

        async def limited_receive() -> Message:
            nonlocal counted, complete
            if complete:  # the next message says that the client left
                return await receive()
            deadline = started + PATIENCE_SECONDS + counted / _BYTES_PER_SECOND
            try:
                # Not asyncio.wait_for, which before Python 3.12 may lose a cancellation.
                with anyio.fail_after(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, _TOO_SLOW, {"Connection": "close"}) from None
            complete = not message.get("more_body", False)
            counted += len(message.get("body", b""))
            if max(counted, declared) > self._max_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_bytes:,} bytes; send less at a time")
            return message

        await self._app(scope, limited_receive, send)
