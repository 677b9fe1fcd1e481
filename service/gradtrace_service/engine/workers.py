"""Threads or processes that own indexes."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from gradtrace_service.engine.work import REFUSALS, IndexByName, Outcome, Work, answer

_owned = threading.local()  # `index_by_name`: gives the indexes of the worker that runs on this thread

_log = logging.getLogger(__name__)


def thread_worker(index_by_name: IndexByName) -> Executor:
    """One thread of this process."""
    return ThreadPoolExecutor(1, "gradtrace-index", _own, (index_by_name,))


class ProcessWorkers(Executor):
    """Processes, each with indexes of its own; the stored rows are mapped from the same memory, but each process
    has its own copy of what `ProgressiveSearcher` holds.

    When one is killed, everything that is being computed fails with BrokenProcessPool; new processes are started for
    the next request.

    begin: called in each process; gives its indexes
    """

    def __init__(self, count: int, begin: Callable[[], IndexByName], log_config: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._start = partial(ProcessPoolExecutor, count, context, _begin_process, (begin, log_config))
        self._pool = self._start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            _log.error("a worker process was killed; new ones are started")
            self._pool = self._start()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def _begin_process(begin: Callable[[], IndexByName], log_config: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them all; the service ends its workers itself
    logging.config.dictConfig(log_config)
    threading.Thread(target=_end_with_parent, name="gradtrace-parent", daemon=True).start()
    _own(begin())


def _end_with_parent() -> None:
    """Exit when the service dies, however it died: the workers hold their own queue open and would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _own(index_by_name: IndexByName) -> None:
    _owned.index_by_name = index_by_name


def answer_batch(works: list[tuple[Work[Any], float]]) -> list[Outcome]:
    """Answer the works of a batch; runs on a worker."""
    now = time.perf_counter()  # a clock that all processes share
    return answer(_owned.index_by_name, [work for work, _ in works], [(now - arrived) * 1000.0 for _, arrived in works])


def answer_batch_elsewhere(works: list[tuple[Work[Any], float]]) -> list[Outcome]:
    """As `answer_batch`, on a worker that is a process."""
    return [_portable(outcome) for outcome in answer_batch(works)]


def _portable(outcome: Outcome) -> Outcome:
    """Pickle loses the tracebacks of exceptions, and one that cannot be unpickled would break all workers."""
    if not isinstance(outcome, Exception):
        return outcome
    try:
        if isinstance(outcome, REFUSALS):
            return pickle.loads(pickle.dumps(outcome))
    except Exception:  # a user's exception class that cannot be unpickled
        pass
    return RuntimeError("".join(traceback.format_exception(outcome)))
