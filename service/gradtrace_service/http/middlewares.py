"""What a request passes on its way to the routes: ids, log, keys and limits; and the headers of every answer."""

from __future__ import annotations

import re
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_client.service_schemas import VERSION_HEADER
from gradtrace_service.http import job_routes
from gradtrace_service.http.access import Access, RateLimit
from gradtrace_service.http.access_log import AccessLog
from gradtrace_service.http.api_keys import KeyFile
from gradtrace_service.http.body_room import BodyRoom
from gradtrace_service.http.metrics import Metrics
from gradtrace_service.http.problems import AnswerFailures, error_responses
from gradtrace_service.http.request_reading import RequestReading
from gradtrace_service.settings import Settings

_REQUEST_ID = "X-Request-ID"
# Which hold examples, filters and lists of rows.
_LARGE_BODIES = frozenset(
    (
        "/complete",
        "/influence",
        "/influence/compare",
        "/influence/groups",
        "/influence/pairs",
        "/influence/removal",
        "/influence/tokens",
        "/rows/delete",
        "/retrain",
    )
)
# What others use as ids, and nothing that could forge a log line.
_KNOWN_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # answers hold training data
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_BEARER = HTTPBearer(auto_error=False, description="An API key, made by `gradtrace key new`.")


def key_file(settings: Settings) -> KeyFile | None:
    """Raises SettingsError where the file of keys cannot be read, or others may write it."""
    return None if settings.api_key_file is None else KeyFile(settings.api_key_file)


def add_middlewares(app: FastAPI, settings: Settings, metrics: Metrics, keys: KeyFile | None) -> None:
    """From the inside to the outside: each adds to, or refuses, what those before it answer."""
    app.add_middleware(RequestReading, room=BodyRoom(int(settings.max_body_mb * 2**20), _LARGE_BODIES))
    app.add_middleware(
        Access,
        keys=keys,
        rate=None if settings.rate_limit is None else RateLimit(settings.rate_limit),
        admin=frozenset(route.path.split("/")[1] for route in job_routes.router.routes if isinstance(route, Route)),
    )
    app.add_middleware(AnswerFailures)
    if settings.cors_origins:  # outside of the keys: a browser asks about an origin without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", _REQUEST_ID],
            expose_headers=["Location", "Retry-After", _REQUEST_ID],
        )
    app.add_middleware(AnswerHeaders, version=app.version)
    app.add_middleware(AccessLog, metrics=metrics)
    app.add_middleware(
        CorrelationIdMiddleware, header_name=_REQUEST_ID, validator=lambda text: bool(_KNOWN_ID.fullmatch(text))
    )


def guarded(settings: Settings) -> dict[str, Any]:
    """How OpenAPI describes routes that are behind keys and limits, as arguments of `include_router`."""
    if settings.api_key_file is None:
        return {"responses": error_responses(400, 429)}
    return {"responses": error_responses(400, 401, 403, 429), "dependencies": [Security(_BEARER)]}


class AnswerHeaders:
    """ASGI middleware: adds the headers that a route has not set itself."""

    def __init__(self, app: ASGIApp, version: str) -> None:
        self._app = app
        self._headers = _HEADERS | {VERSION_HEADER: version}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", _NOTHING)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
