"""The log: lines of text, or of JSON, with the id of the request that they belong to."""

from __future__ import annotations

from typing import Any

from asgi_correlation_id import CorrelationIdFilter
from pythonjsonlogger.core import RESERVED_ATTRS

from gradtrace_service.settings import Settings


def log_config(settings: Settings) -> dict[str, Any]:
    """For logging.config.dictConfig: everything goes to standard error, uvicorn's lines too."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request id": {"()": CorrelationIdFilter, "default_value": "-"}},
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
                "filters": ["request id"],
            }
        },
        "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        "loggers": {
            "uvicorn": {"level": "INFO"},
            "uvicorn.access": {"level": "WARNING"},  # gradtrace_service.http.access logs requests, with their times
        },
    }
