"""What the service counts and measures, for Prometheus. Each application has a registry of its own.

Everything is seen from the process that answers HTTP, also where worker processes compute: the engine runs in it, and
answers carry their times and the rows they touched. docs/operations.md describes the metrics.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, get_args

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gradtrace.errors import GradtraceError
from gradtrace.store.manifest import read_manifest
from gradtrace_client.schemas import Timing
from gradtrace_client.service_schemas import Job
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Outcome, Work
from gradtrace_service.indexes.catalog import Hosted
from gradtrace_service.indexes.jobs import JobRunner
from gradtrace_service.timings import stages

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """An engine's Observer, which is told of every request as well."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "gradtrace_requests", "Requests answered.", ["method", "endpoint", "status"], registry=registry
        )
        self._request_seconds = prometheus.Histogram(
            "gradtrace_request_seconds", "From request to answer.", ["endpoint"], buckets=_SECONDS, registry=registry
        )
        self._errors = prometheus.Counter(
            "gradtrace_errors", "Requests answered with a problem, by its type.", ["kind"], registry=registry
        )
        self._queue_seconds = prometheus.Histogram(
            "gradtrace_queue_seconds", "Time that requests waited for a worker.", buckets=_SECONDS, registry=registry
        )
        self._batch_queries = prometheus.Histogram(
            "gradtrace_batch_queries", "Queries answered in one pass.", buckets=_QUERIES, registry=registry
        )
        self._batch_seconds = prometheus.Histogram(
            "gradtrace_batch_seconds", "Time of a worker for one pass.", buckets=_SECONDS, registry=registry
        )
        self._stage_seconds = prometheus.Histogram(
            "gradtrace_stage_seconds", "Of a pass, by what was done.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._rows_searched = prometheus.Counter(
            "gradtrace_rows_searched", "Rows among which hits were looked for.", registry=registry
        )
        self._rows_touched = prometheus.Counter(
            "gradtrace_rows_touched", "Rows of which more than the first level was read.", registry=registry
        )
        self._generation = prometheus.Gauge(
            "gradtrace_index_generation", "Generation that the last answer came from.", ["index"], registry=registry
        )
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        self._first = "index"

    def watch(self, engine: Engine, hosted: Sequence[Hosted] = (), jobs: JobRunner | None = None) -> None:
        """Read the length of the queue, and what is published and under way, at each scrape."""
        waiting = prometheus.Gauge(
            "gradtrace_queue_length", "Requests that no worker took yet.", registry=self._registry
        )
        waiting.set_function(lambda: engine.waiting)
        if hosted:
            self._first = hosted[0].name
            self._registry.register(_Published(hosted))
        if jobs is not None:
            self._registry.register(_Jobs(jobs))

    def answered(
        self, works: Sequence[Work[Any]], waited: Sequence[float], took: float, outcomes: list[Outcome]
    ) -> None:
        """Called by the engine. Requests that one pass answered carry the same times, which count once."""
        for seconds in waited:
            self._queue_seconds.observe(seconds)
        self._batch_seconds.observe(took)
        timings = [outcome.timing_ms for outcome in outcomes if hasattr(outcome, "timing_ms")]
        for timing in {(one.batch, one.gradient, one.search): one for one in timings}.values():
            self._passed(timing)
        for work, outcome in zip(works, outcomes, strict=True):
            self._touched(work.index or self._first, outcome)

    def _passed(self, timing: Timing) -> None:
        self._batch_queries.observe(timing.batch)
        for stage, milliseconds in stages(timing).items():
            if stage != "queue":
                self._stage_seconds.labels(stage).observe(milliseconds / 1000.0)

    def _touched(self, index: str, outcome: Outcome) -> None:
        info = getattr(outcome, "index", None)
        if info is not None:
            self._generation.labels(index).set(info.generation)
        for result in getattr(outcome, "results", ()):
            self._rows_searched.inc(getattr(result, "rows_searched", 0))
            self._rows_touched.inc(getattr(result, "rows_touched", 0))

    def requested(self, method: str, endpoint: str, status: int, seconds: float, problem: str | None) -> None:
        """One request was answered, or given up.

        endpoint: the address's template, so that there are as many as routes
        problem: the type of the problem document that it was answered with
        """
        self._requests.labels(method, endpoint, status).inc()
        self._request_seconds.labels(endpoint).observe(seconds)
        if problem is not None:
            self._errors.labels(problem.rpartition(":")[2]).inc()

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return prometheus.generate_latest(self._registry)


class _Published(Collector):
    """The generations on disk: above those of the answers, where a new one could not be opened."""

    def __init__(self, hosted: Sequence[Hosted]) -> None:
        self._hosted = hosted

    def collect(self) -> Iterator[Metric]:
        text = "Generation that the index's directory holds."
        published = GaugeMetricFamily("gradtrace_index_published_generation", text, labels=["index"])
        for one in self._hosted:
            with suppress(GradtraceError):  # an index that is gone has none
                published.add_metric([one.name], read_manifest(one.path).generation)
        yield published


class _Jobs(Collector):
    def __init__(self, jobs: JobRunner) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        states = Tally(job.state for job in self._jobs.all())
        jobs = GaugeMetricFamily("gradtrace_jobs", "Re-index jobs that are kept, by state.", labels=["state"])
        for state in get_args(Job.model_fields["state"].annotation):
            jobs.add_metric([state], states[state])
        yield jobs
