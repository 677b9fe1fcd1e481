"""One thread owns the index; requests queue for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gradtrace import Index
from gradtrace.errors import QueryError, TaskError

T = TypeVar("T")

QUEUE_SIZE = 256

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as the queue holds."""


class WorkFailedError(Exception):
    """The work raised what is no fault of the request; its cause is in the log and not for the caller."""


class Engine:
    """Runs work on the thread that owns the index, in order of arrival.

    An Index is not thread-safe, and neither is a user's Task: nothing else may touch them while the engine runs.
    """

    def __init__(self, index: Index, queue_size: int = QUEUE_SIZE) -> None:
        self._index = index
        self._queue_size = queue_size
        self._pending = 0  # only ever changed on the event loop's thread
        self._owner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradtrace-index")

    async def run(self, work: Callable[[Index, float], T]) -> T:
        """`work(index, milliseconds waited)` on the owner thread. Work whose caller is cancelled in time never starts.

        Raises:
            QueueFullError: the queue is full.
            QueryError, TaskError: as the work raised them.
            WorkFailedError: the work raised anything else.
        """
        if self._pending >= self._queue_size:
            raise QueueFullError
        arrived = time.perf_counter()
        self._pending += 1
        try:
            return await asyncio.wrap_future(
                self._owner.submit(lambda: work(self._index, (time.perf_counter() - arrived) * 1000.0))
            )
        except (QueryError, TaskError):
            raise
        except Exception as error:
            _log.exception("a request failed")
            raise WorkFailedError from error
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Let the running work end and drop what still waits."""
        self._owner.shutdown(cancel_futures=True)
