"""Requests whose caller went away are given up."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware: once the body is read, the request's handling is cancelled when its connection is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch: asyncio.Task[Message] | None = None
        gone = False

        async def watched() -> Message:
            nonlocal watch
            if watch is not None:  # a streaming answer asks as well
                return await asyncio.shield(watch)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watch = asyncio.ensure_future(receive())
                watch.add_done_callback(left)
            return message

        def left(done: asyncio.Task[Message]) -> None:
            nonlocal gone
            if not done.cancelled() and not done.exception() and not handling.done():
                gone = True
                handling.cancel()

        handling = asyncio.ensure_future(self._app(scope, watched, send))
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
