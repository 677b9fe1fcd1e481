"""A line for every call that changes indexes or asks about such changes."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from asgi_correlation_id import correlation_id
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace_client.service_schemas import LONGEST_PATH, shortened

_audit = logging.getLogger("gradtrace.audit")


class AuditLog:
    """Lines of JSON by the logger `gradtrace.audit`, and to a file, which may be rotated by renaming it.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._handler = logging.NullHandler() if path is None else WatchedFileHandler(path, encoding="utf-8")
        _audit.addHandler(self._handler)
        _audit.setLevel(logging.INFO)

    def close(self) -> None:
        _audit.removeHandler(self._handler)
        self._handler.close()


async def audited(app: ASGIApp, key: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    """Log the caller of `app` and what it asks for together with the status, as soon as that is known; the call of a
    caller that left before its answer is logged without one.

    key: the name of the caller's key, None without one
    """
    logged = False

    def log(status: int | None, location: str | None) -> None:
        nonlocal logged
        logged = True
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "key": key,
            "client": (scope["client"] or [None])[0],
            "method": scope["method"],
            "path": shortened(scope["path"], LONGEST_PATH),
            "status": status,
            "location": location,  # of the job that the call started; its file has the details
            "request_id": correlation_id.get(),
        }
        _audit.info(json.dumps(line))

    async def logged_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            log(message["status"], Headers(raw=message["headers"]).get("location"))
        await send(message)

    try:
        await app(scope, receive, logged_send)
    finally:
        if not logged:
            log(None, None)
