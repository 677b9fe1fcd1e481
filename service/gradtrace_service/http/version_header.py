"""The service's version in every answer, so that a client of another major version can say so."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_client.service_schemas import VERSION_HEADER


class VersionHeader:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, version: str) -> None:
        self._app = app
        self._version = version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def versioned(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[VERSION_HEADER] = self._version
            await send(message)

        await self._app(scope, receive, versioned)
