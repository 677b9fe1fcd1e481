"""Requests whose caller went away are cancelled."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware: cancels the handling of a request when its connection is closed. To notice that, it reads the
    request ahead of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Message | HTTPException] = asyncio.Queue()

        async def next_message() -> Message:
            message = await messages.get()
            if isinstance(message, HTTPException):
                raise message
            return message

        handling = asyncio.ensure_future(self._app(scope, next_message, send))
        reading = asyncio.ensure_future(_read_until_disconnect(receive, messages))
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


async def _read_until_disconnect(receive: Receive, messages: asyncio.Queue[Message | HTTPException]) -> None:
    try:
        while (message := await receive())["type"] != "http.disconnect":
            messages.put_nowait(message)
    except HTTPException as refusal:  # of the body's size or slowness: the application answers with it
        messages.put_nowait(refusal)
        await asyncio.Event().wait()
