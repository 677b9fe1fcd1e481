"""Threads or processes that own indexes."""

from __future__ import annotations

import logging.config
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from gradtrace_service.work import Indexes, Outcome, Work, answer

_owned = threading.local()  # what the worker owns: `indexes`


def thread_worker(indexes: Indexes) -> Executor:
    """One thread of this process."""
    return ThreadPoolExecutor(1, "gradtrace-index", _own, (lambda: indexes,))


def process_workers(count: int, indexes: Callable[[], Indexes], log_config: dict[str, Any]) -> Executor:
    """Processes, each with indexes of its own; the stored rows are mapped from the same memory."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin_process, (indexes, log_config))


def _begin_process(indexes: Callable[[], Indexes], log_config: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them all; the service ends its workers itself
    logging.config.dictConfig(log_config)
    _own(indexes)


def _own(indexes: Callable[[], Indexes]) -> None:
    _owned.indexes = indexes()


def answer_batch(works: list[tuple[Work[Any], float]]) -> list[Outcome]:
    """On a worker: answer the works of a batch."""
    return answer(_owned.indexes, works, time.perf_counter)
