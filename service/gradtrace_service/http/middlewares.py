"""What a request passes on its way to the routes: ids, log, headers, keys and limits."""

from __future__ import annotations

import re
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from gradtrace_service.http import job_routes
from gradtrace_service.http.access import Access, RateLimit
from gradtrace_service.http.access_log import AccessLog
from gradtrace_service.http.api_keys import KeyFile
from gradtrace_service.http.body_limit import BodyLimit
from gradtrace_service.http.disconnects import CancelOnDisconnect
from gradtrace_service.http.headers import AnswerHeaders
from gradtrace_service.http.metrics import Metrics
from gradtrace_service.http.problems import AnswerFailures, error_responses
from gradtrace_service.settings import Settings

_REQUEST_ID = "X-Request-ID"
_KNOWN_ID = re.compile(
    r"[\w.:/+=@-]{1,128}", re.ASCII
)  # what others use as ids, and nothing that could forge a log line
_BEARER = HTTPBearer(auto_error=False, description="An API key, made by `gradtrace key new`.")


def add_middlewares(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """From the inside to the outside: each adds to, or refuses, what those before it answer.

    Raises:
        SettingsError: the file of keys cannot be read.
    """
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimit, max_bytes=int(settings.max_body_mb * 2**20))
    app.add_middleware(
        Access,
        keys=None if settings.api_key_file is None else KeyFile(settings.api_key_file),
        rate=None if settings.rate_limit is None else RateLimit(settings.rate_limit),
        admin=frozenset(route.path.split("/")[1] for route in job_routes.router.routes if isinstance(route, Route)),
    )
    app.add_middleware(AnswerFailures)
    if settings.cors_origins:  # outside of the keys: a browser asks about an origin without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
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
        return {"responses": error_responses(429)}
    return {"responses": error_responses(401, 403, 429), "dependencies": [Security(_BEARER)]}
