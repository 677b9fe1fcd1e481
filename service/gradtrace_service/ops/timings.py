"""The stages of an answer and how long each took: for the Server-Timing header and for OpenTelemetry traces.

A trace has a span for each request, made by FastAPI, and in it one for each stage of the answer.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from gradtrace.errors import MissingLibraryError
from gradtrace_client.schemas import Timing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_STAGES = ("queue", "gradient", "search", "rescore", "percentiles", "render")  # in the order in which they happen
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def milliseconds_since(moment: float) -> float:
    """moment: as `time.perf_counter` gave it."""
    return (time.perf_counter() - moment) * 1000.0


def stages(timing: Timing) -> dict[str, float]:
    """Milliseconds of the stages that the answer went through."""
    return {stage: spent for stage in _STAGES if (spent := getattr(timing, stage))}


def server_timing(timing: Timing) -> str:
    """The Server-Timing header, which browsers' developer tools draw (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={spent:.3f}" for stage, spent in {**stages(timing), "total": timing.total}.items())


def tracer_provider(endpoint: str | None) -> TracerProvider | None:
    """Sends spans to a collector, by OTLP over HTTP; None where neither the setting nor the environment names one.

    endpoint: the collector's base address; None: as the OTEL_* variables say

    Raises:
        MissingLibraryError: there is a collector, but no OpenTelemetry to reach it with.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingLibraryError("opentelemetry", "otel") from error
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "gradtrace"}
    provider = TracerProvider(resource=Resource.create(name))
    address = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return provider


def trace_stages(provider: TracerProvider, timing: Timing) -> None:
    """Record the stages of an answer that is ready now as children of the current span.

    They follow each other without gaps and end now: the time between stages, such as parsing, is left out.
    """
    tracer, spent = provider.get_tracer("gradtrace"), stages(timing)
    moment = time.time_ns() - int(sum(spent.values()) * 1e6)
    for stage, milliseconds in spent.items():
        span = tracer.start_span(stage, start_time=moment, attributes={"gradtrace.batch": timing.batch})
        moment += int(milliseconds * 1e6)
        span.end(moment)
