"""The log: lines of text, or of JSON, with the id of the request that they are about."""

from __future__ import annotations

import logging
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS

from gradtrace_service.ops.request_ids import request_id
from gradtrace_service.settings import Settings


class WithRequestId(logging.Filter):
    """Puts the id of the request being handled on each record, `-` outside of requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get() or "-"
        return True


def log_config(settings: Settings) -> dict[str, Any]:
    """For logging.config.dictConfig: everything goes to standard error, uvicorn's lines as well."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request id": {"()": WithRequestId}},
        "formatters": {
            "text": {"format": "%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s"},
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "%(levelname)s %(name)s %(message)s %(request_id)s",
                "rename_fields": {"levelname": "level", "name": "logger"},
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's second version of some messages
                "timestamp": True,
            },
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": settings.log_format,
                "filters": ["request id"],
            }
        },
        "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        "loggers": {
            "uvicorn": {"level": "INFO"},
            "uvicorn.access": {"level": "WARNING"},  # gradtrace_service.http.access logs requests, with their times
        },
    }
