"""A line for every call that changes indexes or asks about such changes."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from asgi_correlation_id import correlation_id
from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

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


class AuditedCall:
    """One call: its caller and what it asks for are logged together with the status, as soon as that is known.

    key: the name of the caller's key, None without one
    """

    def __init__(self, scope: Scope, send: Send, key: str | None) -> None:
        self._scope, self._send, self._key = scope, send, key
        self._logged = False

    async def send(self, message: Message) -> None:
        """Takes the place of ASGI's `send`."""
        if message["type"] == "http.response.start":
            self._log(message["status"], Headers(raw=message["headers"]).get("location"))
        await self._send(message)

    def end(self) -> None:
        """Log the call of a caller that left before its answer, without a status."""
        if not self._logged:
            self._log(None, None)

    def _log(self, status: int | None, location: str | None) -> None:
        self._logged = True
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "key": self._key,
            "client": (self._scope["client"] or [None])[0],
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": status,
            "location": location,  # of the job that the call started; its file has the details
            "request_id": correlation_id.get(),
        }
        _audit.info(json.dumps(line))
