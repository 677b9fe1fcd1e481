"""The stages of an answer and how long each took."""

from __future__ import annotations

import time

from gradtrace_client.schemas import Timing

_STAGES = ("queue", "gradient", "search", "rescore", "percentiles", "render")  # in the order in which they happen


def milliseconds_since(moment: float) -> float:
    """moment: as `time.perf_counter` gave it."""
    return (time.perf_counter() - moment) * 1000.0


def stages(timing: Timing) -> dict[str, float]:
    """Milliseconds of the stages that the answer went through."""
    return {stage: spent for stage in _STAGES if (spent := getattr(timing, stage))}


def server_timing(timing: Timing) -> str:
    """The Server-Timing header, which browsers' developer tools draw (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={spent:.3f}" for stage, spent in {**stages(timing), "total": timing.total}.items())
