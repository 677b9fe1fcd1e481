"""Counters and histograms for Prometheus. Each application has its own registry.

All are recorded in the process that answers HTTP, also where worker processes compute: the engine runs in it, and
answers carry their times and the rows they touched. docs/operations.md describes the metrics.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, get_args

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gradtrace.errors import GradtraceError
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client.schemas import Timing
from gradtrace_client.service_schemas import Job
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Outcome, Work
from gradtrace_service.indexes.hosted import Hosted, file_stamp
from gradtrace_service.indexes.jobs import JobRunner
from gradtrace_service.ops.timings import stages

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """`batch_answered` is an engine's Observer; the access log reports every request by `requested`."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        counter = partial(prometheus.Counter, registry=registry)
        seconds = partial(prometheus.Histogram, buckets=_SECONDS, registry=registry)
        self._requests = counter("gradtrace_requests", "Requests answered.", ["method", "endpoint", "status"])
        self._request_seconds = seconds("gradtrace_request_seconds", "From request to answer.", ["endpoint"])
        self._errors = counter("gradtrace_errors", "Requests answered with a problem, by its type.", ["kind"])
        self._queue_seconds = seconds("gradtrace_queue_seconds", "Time that requests waited for a worker.")
        self._batch_queries = prometheus.Histogram(
            "gradtrace_batch_queries", "Queries answered in one pass.", buckets=_QUERIES, registry=registry
        )
        self._batch_seconds = seconds("gradtrace_batch_seconds", "Time of a worker for one pass.")
        self._stage_seconds = seconds("gradtrace_stage_seconds", "Time of a pass, by stage.", ["stage"])
        self._rows_searched = counter("gradtrace_rows_searched", "Rows among which hits were looked for.")
        self._rows_touched = counter("gradtrace_rows_touched", "Rows of which more than the first level was read.")
        self._generation = prometheus.Gauge(
            "gradtrace_index_generation", "Generation that the last answer came from.", ["index"], registry=registry
        )
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        self._default_index = "index"
        self._published: _Published | None = None

    def watch(self, engine: Engine, hosted: Sequence[Hosted] = (), jobs: JobRunner | None = None) -> None:
        """At each scrape, read the length of the queue, the published generations and the jobs."""
        gauge = partial(prometheus.Gauge, registry=self._registry)
        queue_length = gauge("gradtrace_queue_length", "Requests that no worker has taken yet.")
        queue_length.set_function(lambda: engine.waiting)
        settings = gauge("gradtrace_setting", "Settings that are numbers.", ["name"])
        for name, value in engine.settings:
            if isinstance(value, int | float):
                settings.labels(name).set(value)
        self._registry.register(_IndexStates(engine))
        if hosted:
            self._default_index = hosted[0].name
            self._published = _Published(hosted)
            self._registry.register(self._published)
        if jobs is not None:
            states = gauge("gradtrace_jobs", "Re-index jobs that are kept, by state.", ["state"])
            for state in get_args(Job.model_fields["state"].annotation):
                states.labels(state).set_function(partial(_count_jobs, jobs, state))

    def batch_answered(
        self, works: Sequence[Work[Any]], waited: Sequence[float], took: float, outcomes: Sequence[Outcome]
    ) -> None:
        """Called by the engine. Requests that one pass answered carry the same times, which are counted once."""
        for seconds in waited:
            self._queue_seconds.observe(seconds)
        self._batch_seconds.observe(took)
        timings = [outcome.timing_ms for outcome in outcomes if hasattr(outcome, "timing_ms")]
        for timing in {(timing.batch, timing.gradient, timing.search): timing for timing in timings}.values():
            self._count_pass(timing)
        for work, outcome in zip(works, outcomes, strict=True):
            self._count_rows(work.index or self._default_index, outcome)

    def _count_pass(self, timing: Timing) -> None:
        self._batch_queries.observe(timing.batch)
        for stage, milliseconds in stages(timing).items():
            if stage != "queue":
                self._stage_seconds.labels(stage).observe(milliseconds / 1000.0)

    def _count_rows(self, index: str, outcome: Outcome) -> None:
        info = getattr(outcome, "index", None)
        if info is not None:
            self._generation.labels(index).set(info.generation)
        for result in getattr(outcome, "results", ()):
            self._rows_searched.inc(getattr(result, "rows_searched", 0))
            self._rows_touched.inc(getattr(result, "rows_touched", 0))

    def requested(self, method: str, endpoint: str, status: int, seconds: float, problem: str | None) -> None:
        """One request was answered, or given up.

        endpoint: the address's template, so that there are as many as routes
        problem: the type of the problem document that answered it
        """
        self._requests.labels(method, endpoint, status).inc()
        self._request_seconds.labels(endpoint).observe(seconds)
        if problem is not None:
            self._errors.labels(problem.rpartition(":")[2]).inc()

    async def render(self) -> bytes:
        """In Prometheus's text format."""
        if self._published is not None:
            await asyncio.to_thread(self._published.read)  # a slow disk must not keep the event loop from answering
        return prometheus.generate_latest(self._registry)


class _Published(Collector):
    """The generations on disk: higher than those of the answers while a new one cannot be opened; and the free space
    beside them, which the next generation needs."""

    def __init__(self, hosted: Sequence[Hosted]) -> None:
        self._hosted = hosted
        self._generations: dict[str, tuple[object, int]] = {}  # by index, with the stamp of its manifest
        self._free: dict[str, int] = {}

    def read(self) -> None:
        """Look at the disk. A manifest is parsed when it has changed: it is long where there are many shards."""
        generations, free = {}, {}
        for hosted in self._hosted:
            with suppress(GradtraceError, OSError):  # a deleted index has none
                free[hosted.name] = shutil.disk_usage(hosted.path).free
                generations[hosted.name] = self._generation(hosted)
        self._generations, self._free = generations, free

    def _generation(self, hosted: Hosted) -> tuple[object, int]:
        stamp, known = file_stamp(hosted.path / MANIFEST_NAME), self._generations.get(hosted.name)
        if known is not None and stamp is not None and known[0] == stamp:
            return known
        return stamp, read_manifest(hosted.path).generation

    def collect(self) -> Iterator[Metric]:
        text = "Generation that the index's directory holds."
        published = GaugeMetricFamily("gradtrace_index_published_generation", text, labels=["index"])
        for name, (_, generation) in self._generations.items():
            published.add_metric([name], generation)
        yield published
        text = "Free space of the disk that holds the index's directory."
        free = GaugeMetricFamily("gradtrace_index_disk_free_bytes", text, labels=["index"])
        for name, size in self._free.items():
            free.add_metric([name], size)
        yield free


class _IndexStates(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        text = "1 while the index cannot be opened, or was damaged while it was open."
        unavailable = GaugeMetricFamily("gradtrace_index_unavailable", text, labels=["index"])
        for index, state in self._engine.states().items():
            unavailable.add_metric([index], state is None)
        yield unavailable
        text = "Time for which a worker has been opening the index, or its new generation; 0: none does."
        opening = GaugeMetricFamily("gradtrace_index_opening_seconds", text, labels=["index"])
        openings = self._engine.openings()
        for index in self._engine.states().keys() | openings.keys():
            opening.add_metric([index], openings[index].seconds if index in openings else 0.0)
        yield opening


def _count_jobs(jobs: JobRunner, state: str) -> int:
    return sum(job.state == state for job in jobs.all())
