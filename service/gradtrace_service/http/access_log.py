"""Every request is counted and logged, with its outcome and how long it took."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_client.service_schemas import LONGEST_PATH, shortened
from gradtrace_service.http.metrics import Metrics

_GONE = 499  # no answer: the caller went away (nginx's number for it)

_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})

_log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware, inside none but CorrelationIdMiddleware: reports every request to the metrics and the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status, is_problem, problem = _GONE, False, None

        async def watched_send(message: Message) -> None:
            nonlocal status, is_problem, problem
            if message["type"] == "http.response.start":
                status = message["status"]
                is_problem = Headers(raw=message["headers"]).get("content-type") == "application/problem+json"
            elif is_problem and problem is None:
                with suppress(ValueError, KeyError):  # one message holds the whole document
                    problem = json.loads(message["body"])["type"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            self._report(scope, status, problem, time.perf_counter() - started)

    def _report(self, scope: Scope, status: int, problem: str | None, seconds: float) -> None:
        # Callers must not be able to add time series: hence the route's template, and only methods that exist.
        endpoint = getattr(scope.get("route"), "path", "(none)")
        method = scope["method"] if scope["method"] in _METHODS else "(other)"
        self._metrics.requested(method, endpoint, status, seconds, problem)
        fields = {
            "method": scope["method"],
            "path": shortened(scope["path"], LONGEST_PATH),
            "status": status,
            "milliseconds": round(seconds * 1000.0, 3),
            "client": (scope.get("client") or ("",))[0],
            "problem": problem,
        }
        _log.info("%(method)s %(path)r %(status)d %(milliseconds).1f ms", fields, extra=fields)
