"""Jobs as they go on: their states from the service's events, and a progress bar of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from pydantic import ValidationError

from gradtrace_client._errors import JobFailedError
from gradtrace_client.service_schemas import Job

POLL_SECONDS = 1.0  # between two looks where events do not come through
LOOK_SECONDS = 0.25  # between two looks whether a job's generation is taken over
TAKE_OVER_SECONDS = 60.0  # that this may take: the new generation is opened beside the old one
_WIDTH = 30


def has_events(response: httpx.Response) -> bool:
    kind: str = response.headers.get("Content-Type", "")
    return kind.startswith("text/event-stream")


def state_in(line: str) -> Job | None:
    """The job's state in a line of an event stream; None: the line is another, such as one that keeps it alive."""
    try:
        return Job.model_validate_json(line.removeprefix("data:"))
    except ValidationError:
        return None


def succeeded(job: Job) -> Job:
    """Raises JobFailedError."""
    if job.state == "failed":
        raise JobFailedError(job)
    return job


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Callable[[Job], None]]:
    """Yields what shows a job's state, as one line on stderr: on a terminal and in a notebook, but in no log file."""
    shown = wanted and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    def show(job: Job) -> None:
        bar = ("#" * round(job.progress * _WIDTH)).ljust(_WIDTH, ".")
        text = f"\r{job.operation} of {job.index} [{bar}] {job.progress:4.0%}, {job.state}"
        if shown:
            print(text, end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown:
            print(file=sys.stderr)
