"""The log: lines of text, or of JSON, with the id of the request that they belong to, and few of one kind a second."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from asgi_correlation_id import CorrelationIdFilter
from pythonjsonlogger.core import RESERVED_ATTRS

from gradtrace_service.settings import Settings

_LINES_A_SECOND = 20


@dataclass(slots=True)
class _Kind:
    """Lines of one statement (and, of requests, one status) in this second, and those left out since the last one."""

    second: int = 0
    lines: int = 0
    left_out: int = 0


class FewOfAKind(logging.Filter):
    """Of warnings, errors and refused requests, leaves out those of a kind beyond twenty a second, and says in the next
    one how many: clients cannot fill the disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, int, int], _Kind] = {}  # as many as statements that log, by their statuses

    def filter(self, record: logging.LogRecord) -> bool:
        status = getattr(record, "status", 0)
        if record.levelno < logging.WARNING and status < 400:
            return True
        kind = self._kinds.setdefault((record.pathname, record.lineno, status), _Kind())
        second = int(time.monotonic())
        if second != kind.second:
            kind.second, kind.lines = second, 0
        kind.lines += 1
        if kind.lines > _LINES_A_SECOND:
            kind.left_out += 1
            return False
        if kind.left_out:
            record.msg = f"{record.msg} ({kind.left_out:,} lines like this one were left out)"
            kind.left_out = 0
        return True


def log_config(settings: Settings) -> dict[str, Any]:
    """For logging.config.dictConfig: everything goes to standard error, uvicorn's lines too."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "request id": {"()": CorrelationIdFilter, "default_value": "-"},
            "few of a kind": {"()": FewOfAKind},
        },
        "formatters": {
            "text": {"format": "%(asctime)s %(levelname)s [%(correlation_id)s] %(name)s: %(message)s"},
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "%(levelname)s %(name)s %(message)s %(correlation_id)s",
                "rename_fields": {"levelname": "level", "name": "logger", "correlation_id": "request_id"},
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's second version of some messages
                "timestamp": True,
            },
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": settings.log_format,
                "filters": ["few of a kind", "request id"],
            }
        },
        "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        "loggers": {
            "uvicorn": {"level": "INFO"},
            "uvicorn.access": {"level": "WARNING"},  # gradtrace_service.http.access logs requests, with their times
        },
    }
