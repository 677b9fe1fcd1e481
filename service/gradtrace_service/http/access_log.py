"""Every request is counted and logged, with its outcome and how long it took."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
        started, answer = time.perf_counter(), _Answer()

        async def watched_send(message: Message) -> None:
            answer.watch(message)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            answer.failed()  # the handler outside all middlewares answers with 500
            raise
        finally:
            self._report(scope, answer, time.perf_counter() - started)

    def _report(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        # Callers must not be able to add time series: hence the route's template, and only methods that exist.
        endpoint = getattr(scope.get("route"), "path", "(none)")
        method = scope["method"] if scope["method"] in _METHODS else "(other)"
        self._metrics.requested(method, endpoint, answer.status, seconds, answer.problem)
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": answer.status,
            "milliseconds": round(seconds * 1000.0, 3),
            "client": (scope.get("client") or ("",))[0],
            "problem": answer.problem,
        }
        _log.info("%(method)s %(path)r %(status)d %(milliseconds).1f ms", fields, extra=fields)


class _Answer:
    """The status and the problem of an answer, read from the messages that send it."""

    def __init__(self) -> None:
        self.status = _GONE
        self.problem: str | None = None
        self._is_problem = False

    def watch(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_problem = Headers(raw=message["headers"]).get("content-type") == "application/problem+json"
        elif self._is_problem and self.problem is None:
            with suppress(ValueError, KeyError):  # one message holds the whole document
                self.problem = json.loads(message["body"])["type"]

    def failed(self) -> None:
        if self.status == _GONE:
            self.status, self.problem = 500, "urn:gradtrace:problem:failure"
