"""Requests whose caller went away are given up."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware: once the body is there, the request's handling is cancelled when its connection is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch: asyncio.Task[Message] | None = None
        gone = False
        # The routes do not ask for a body that is none: it is taken here, to know of the caller from then on.
        waiting = [] if _announces_body(scope) else [await receive()]

        async def watched() -> Message:
            nonlocal gone
            if waiting:
                return waiting.pop()
            if watch is not None:  # a streaming answer asks as well
                return await asyncio.shield(watch)
            message = await receive()
            if message["type"] == "http.disconnect":  # within the body, which the framework would call malformed
                gone = True
                raise asyncio.CancelledError
            watch_after(message)
            return message

        def watch_after(message: Message) -> None:
            nonlocal watch
            if message["type"] == "http.request" and not message.get("more_body", False):
                watch = asyncio.ensure_future(receive())
                watch.add_done_callback(left)

        def left(done: asyncio.Task[Message]) -> None:
            nonlocal gone
            if not done.cancelled() and not done.exception() and not handling.done():
                gone = True
                handling.cancel()

        handling = asyncio.ensure_future(self._app(scope, watched, send))
        for message in waiting:
            watch_after(message)
        try:
            await handling
        except asyncio.CancelledError:
            handling.cancel()  # where the server itself cancels
            if not gone:
                raise
        finally:
            if watch is not None:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch


def _announces_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
