"""Each request has an id: the one that its X-Request-ID gives, or a new one. Answers and log lines carry it."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
_KNOWN = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)  # what others use as ids, and nothing that could forge a log line

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request being handled


class RequestIds:
    """ASGI middleware, the outermost: sets `request_id` and the answer's X-Request-ID."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        known = given if _KNOWN.fullmatch(given) else uuid.uuid4().hex
        request_id.set(known)  # never reset: each request has a context of its own, which outlives this for the log

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = known
            await send(message)

        await self._app(scope, receive, named)
