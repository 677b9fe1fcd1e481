"""Checks of what a service says of itself at /metrics: its limits, its indexes' generations, and what went wrong."""

from __future__ import annotations

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from gradtrace_service.doctor.findings import Says, in_bytes
from gradtrace_service.doctor.service import Service

_USED = 0.8  # share of the descriptors from which on there is a warning
_FREE_BYTES = 1e9
_OTHER_DESCRIPTORS = 128  # beside those of connections: mapped rows, logs, pipes to workers
_FAILURES = ("failure", "out-of-memory", "worker-lost", "shard-lost", "index-unavailable")

Samples = dict[str, dict[str, float]]  # by metric, then by its labels' values


def read_metrics(service: Service) -> Samples:
    """The service's metrics; none where it refuses to tell them."""
    answer, samples = service.http.get("/metrics"), defaultdict[str, dict[str, float]](dict)
    for family in text_string_to_metric_families(answer.text) if answer.is_success else ():
        for sample in family.samples:
            samples[sample.name][", ".join(sample.labels.values())] = sample.value
    return dict(samples)


def process(samples: Samples) -> Says:
    """Descriptors and memory of the process that answers HTTP."""
    used, limit = (samples.get(name, {}).get("", 0.0) for name in ("process_open_fds", "process_max_fds"))
    text = f"{used:,.0f} of {limit:,.0f} descriptors are open"
    if limit and used > _USED * limit:
        yield "warning", f"{text}: raise `ulimit -n`, or let a proxy hold the connections"
    else:
        yield "ok", text
    yield "ok", f"{in_bytes(samples.get('process_resident_memory_bytes', {}).get('', 0.0))} of memory"


def limits(samples: Samples) -> Says:
    """The settings that are numbers; and whether the connections that they allow fit into the descriptors."""
    settings, descriptors = samples.get("gradtrace_setting", {}), samples.get("process_max_fds", {}).get("", 0.0)
    yield "ok", ", ".join(f"{name} {value:g}" for name, value in settings.items())
    connections = settings.get("max_connections", 0.0)
    if descriptors and connections + _OTHER_DESCRIPTORS > descriptors:
        text = f"{connections:,.0f} connections and what else is open exceed the {descriptors:,.0f} descriptors"
        yield "warning", f"{text}: raise `ulimit -n`, or lower --max-connections"


def load(samples: Samples) -> Says:
    """Requests that wait, and those that failed since the start."""
    yield "ok", f"{samples.get('gradtrace_queue_length', {}).get('', 0.0):.0f} requests wait for a worker"
    for kind, count in samples.get("gradtrace_errors_total", {}).items():
        if kind in _FAILURES and count:
            yield "warning", f"{count:.0f} requests ended with {kind!r} since the start: the service's log says why"


def generations(samples: Samples) -> Says:
    """Published generations that are not answered from, indexes that cannot be, failed jobs, and free disk space."""
    answered = samples.get("gradtrace_index_generation", {})
    for name, published in samples.get("gradtrace_index_published_generation", {}).items():
        if name in answered and published > answered[name]:
            text = f"{name}: the last answer was from generation {answered[name]:.0f}, and {published:.0f} is published"
            yield "warning", f"{text}: if that does not pass, the service's log says why it cannot be opened"
        else:
            yield "ok", f"{name}: generation {published:.0f} is published"
    for name, unavailable in samples.get("gradtrace_index_unavailable", {}).items():
        if unavailable:
            yield "problem", f"{name} cannot be answered from: `gradtrace doctor DIRECTORY` names the damage"
    jobs = samples.get("gradtrace_jobs", {})
    failed = jobs.get("failed", 0.0) + jobs.get("interrupted", 0.0)
    if failed:
        yield "warning", f"{failed:.0f} jobs failed: GET /jobs says why"


def disk(samples: Samples) -> Says:
    """Free space beside each index."""
    for name, free in samples.get("gradtrace_index_disk_free_bytes", {}).items():
        if free < _FREE_BYTES:
            yield "warning", f"{name}: {in_bytes(free)} free; `gradtrace doctor DIRECTORY` says what updates need"
        else:
            yield "ok", f"{name}: {in_bytes(free)} free"
