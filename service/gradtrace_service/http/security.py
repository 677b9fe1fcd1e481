"""What stands before the routes: keys, rate limits, and what browsers may do with answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from gradtrace_service.http import job_routes
from gradtrace_service.http.access import Access
from gradtrace_service.http.api_keys import KeyFile
from gradtrace_service.http.problems import AnswerFailures, error_responses
from gradtrace_service.http.rate_limit import RateLimit
from gradtrace_service.http.security_headers import SecurityHeaders
from gradtrace_service.ops import request_ids
from gradtrace_service.settings import Settings

_BEARER = HTTPBearer(auto_error=False, description="An API key, made by `gradtrace key new`.")


def add_security(app: FastAPI, settings: Settings) -> None:
    """Middlewares, from the inside to the outside: each adds to or refuses what those before it answer.

    Raises:
        SettingsError: the file of keys cannot be read.
    """
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
            allow_headers=["Authorization", "Content-Type", request_ids.HEADER],
            expose_headers=["Location", "Retry-After", request_ids.HEADER],
        )
    app.add_middleware(SecurityHeaders)


def guarded(settings: Settings) -> dict[str, Any]:
    """How OpenAPI describes routes that are behind keys and limits, as arguments of `include_router`."""
    if settings.api_key_file is None:
        return {"responses": error_responses(429)}
    return {"responses": error_responses(401, 403, 429), "dependencies": [Security(_BEARER)]}
