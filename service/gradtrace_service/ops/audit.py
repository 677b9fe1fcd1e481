"""A line for every call that changes indexes or asks about such changes."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

from gradtrace_service.ops.request_ids import request_id

_log = logging.getLogger("gradtrace.audit")


class AuditLog:
    """Lines of JSON by the logger `gradtrace.audit`, and to a file, which may be rotated by renaming it.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._handler = logging.NullHandler() if path is None else WatchedFileHandler(path, encoding="utf-8")
        _log.addHandler(self._handler)
        _log.setLevel(logging.INFO)

    def close(self) -> None:
        _log.removeHandler(self._handler)
        self._handler.close()


class AuditedCall:
    """One call: who asks for what, told together with the outcome, as soon as that is known.

    key: the name of the caller's key, None without one
    """

    def __init__(self, scope: Scope, send: Send, key: str | None) -> None:
        self._scope, self._send, self._key = scope, send, key
        self._told = False

    async def send(self, message: Message) -> None:
        """In the place of ASGI's send."""
        if message["type"] == "http.response.start":
            self._tell(message["status"], Headers(raw=message["headers"]).get("location"))
        await self._send(message)

    def end(self) -> None:
        """A caller that left before its answer is told of as well, with no status."""
        if not self._told:
            self._tell(None, None)

    def _tell(self, status: int | None, location: str | None) -> None:
        self._told = True
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "key": self._key,
            "client": (self._scope["client"] or [None])[0],
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": status,
            "location": location,  # of the job that the call started; its file says the rest
            "request_id": request_id.get(),
        }
        _log.info(json.dumps(line))
