"""The progress of a job as one line of text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradtrace_client.service_schemas import Job

_WIDTH = 30


@contextmanager
def progress_bar(enabled: bool) -> Iterator[Callable[[Job], None]]:
    """Yields a function that shows a job's state on stderr, if that is a terminal or a notebook and not a log file."""
    shown = enabled and (sys.stderr.isatty() or _in_notebook())

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


def _in_notebook() -> bool:
    """Whether a kernel runs this code; other libraries import ipykernel where none does."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
