"""From the event loop to the workers that own the indexes, and back.

Requests wait in one bounded queue. Whenever a worker is free, it is given the oldest request together with those behind
it that may be answered in the same pass (a micro-batch), so batches grow with the load and a lone request never waits
for company longer than `batch_wait_ms`. A request whose caller went away, or whose deadline passed, leaves the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from gradtrace_service.engine.work import REFUSALS, Outcome, Work
from gradtrace_service.settings import DEFAULTS, Settings

T = TypeVar("T")

# Told of every batch that was answered: its works, the seconds that each waited in the queue, the seconds of computing
# all of them, and the outcomes.
Observer = Callable[[Sequence[Work[Any]], Sequence[float], float, Sequence[Outcome]], None]


class QueueFullError(Exception):
    """As many requests wait as the queue holds."""


class DeadlineError(Exception):
    """The answer took longer than a request may take."""


class WorkFailedError(Exception):
    """Answering failed, and the request is not at fault. The cause is for the log, not for the caller."""


class DrainingError(Exception):
    """The service is shutting down and accepts nothing new."""


class WorkerLostError(Exception):
    """The process that computed the answer was killed. The request may be sent again."""


@dataclass(eq=False, slots=True)
class _Waiting:
    work: Work[Any]
    answer: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)  # a clock that all processes share


class Engine:
    """Answers works by `workers`, in order of arrival. All methods are for the event loop's thread.

    Args:
        workers: each of its threads or processes owns its indexes: an Index is not thread-safe, nor is a user's Task.
        answer: what they run on a list of (work, time of arrival), giving an outcome for each.
        slots: number of workers.
        settings: `queue_size`, `batch_size`, `batch_wait_ms` and `deadline_seconds` are used.

    Attributes:
        computing: requests that workers have taken and not answered yet.
    """

    def __init__(
        self,
        workers: Executor,
        answer: Callable[[list[tuple[Work[Any], float]]], list[Outcome]],
        slots: int = 1,
        settings: Settings = DEFAULTS,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.workers, self._answer, self._observer = workers, answer, observer
        self.slots = self._free = slots
        self._queue: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.computing = 0
        self.draining = False

    @property
    def waiting(self) -> int:
        """Requests that no worker has taken yet and whose caller still waits."""
        return sum(not waiting.answer.done() for waiting in self._queue)

    async def run(self, work: Work[T]) -> T:
        """The work's answer. Work whose caller is cancelled before a worker took it never starts.

        Raises:
            DrainingError: `drain` was called.
            QueueFullError: the queue is full.
            DeadlineError: it took too long.
            QueryError, TaskError, IndexUnavailableError, OutOfMemoryError: as the work raised them.
            WorkerLostError: the process that computed the answer was killed.
            WorkFailedError: the work raised anything else.
        """
        if self.draining:
            raise DrainingError
        if len(self._queue) >= self.settings.queue_size:
            self._queue = deque(waiting for waiting in self._queue if not waiting.answer.done())
        if len(self._queue) >= self.settings.queue_size:
            raise QueueFullError
        waiting = _Waiting(work, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._dispatch()
        try:
            return cast(T, await asyncio.wait_for(waiting.answer, self.settings.deadline_seconds))
        except asyncio.TimeoutError:
            raise DeadlineError from None

    async def drain(self) -> None:
        """Refuse new work from now on, and wait until all accepted work is answered."""
        self.draining = True
        while self._running:
            await asyncio.wait(self._running)

    def _dispatch(self) -> None:
        """Start a batch on every free worker."""
        while self._free and self._queue:
            self._free -= 1
            running = asyncio.ensure_future(self._serve_batch())
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _serve_batch(self) -> None:
        if self.settings.batch_wait_ms:
            await asyncio.sleep(self.settings.batch_wait_ms / 1000.0)
        try:
            batch = self._take_batch()
            if batch:
                await self._compute(batch)
        finally:
            self._free += 1
            self._dispatch()

    def _take_batch(self) -> list[_Waiting]:
        """Remove from the queue the oldest request, and those that can be answered with it and fit into its batch."""
        batch: list[_Waiting] = []
        left: list[_Waiting] = []
        room = self.settings.batch_size
        while self._queue and room > 0:
            waiting = self._queue.popleft()
            if waiting.answer.done():
                continue
            work = waiting.work
            if not batch or (work.kind is not None and work.kind == batch[0].work.kind and work.size <= room):
                batch.append(waiting)
                room = room - work.size if work.kind is not None else 0
            else:
                left.append(waiting)
        self._queue.extendleft(reversed(left))
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        works = [(waiting.work, waiting.arrived) for waiting in batch]
        self.computing += len(batch)
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self.workers, self._answer, works)
        except Exception as error:  # the worker process died
            outcomes = [error] * len(batch)
        finally:
            self.computing -= len(batch)
        took = time.perf_counter() - started
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if not waiting.answer.done():
                _settle(waiting.answer, outcome)
        if self._observer is not None:
            waited = [started - waiting.arrived for waiting in batch]
            self._observer([waiting.work for waiting in batch], waited, took, outcomes)

    def close(self) -> None:
        """Drop the queue. A worker that is still busy after draining is not waited for."""
        for waiting in self._queue:
            waiting.answer.cancel()
        self._queue.clear()
        self.workers.shutdown(wait=not self.computing, cancel_futures=True)


def _settle(answer: asyncio.Future[Any], outcome: Outcome) -> None:
    if not isinstance(outcome, Exception):
        answer.set_result(outcome)
    elif isinstance(outcome, REFUSALS):
        answer.set_exception(outcome)
    elif isinstance(outcome, BrokenProcessPool):
        answer.set_exception(WorkerLostError())
    else:
        failure = WorkFailedError()
        failure.__cause__ = outcome
        answer.set_exception(failure)
