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
from typing import Any, Protocol, TypeVar, cast

from gradtrace_service.engine.work import REFUSALS, Outcome, Work

T = TypeVar("T")


class QueueFullError(Exception):
    """As many requests wait as the queue holds."""


class DeadlineError(Exception):
    """No answer within the time that a request may take."""


class WorkFailedError(Exception):
    """The work raised what is no fault of the request; its cause is for the log and not for the caller."""


class DrainingError(Exception):
    """The service is about to end and takes nothing new."""


class WorkerLostError(Exception):
    """The process that was at the work is gone; the work may be asked for again."""


class Observer(Protocol):
    """Told of every batch, once it is answered."""

    def answered(
        self, works: Sequence[Work[Any]], waited: Sequence[float], took: float, outcomes: list[Outcome]
    ) -> None:
        """waited: seconds in the queue, of each work;  took: seconds of computing, of all together"""


@dataclass(frozen=True, slots=True)
class Limits:
    """queue_size: requests that may wait;  batch_size: queries that are answered in one pass;  batch_wait_ms: how long
    a free worker waits for more of them;  deadline: seconds from arrival to answer"""

    queue_size: int = 256
    batch_size: int = 16
    batch_wait_ms: float = 0.0
    deadline: float = 60.0


@dataclass(eq=False, slots=True)
class _Waiting:
    work: Work[Any]
    answer: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)  # of a clock that all processes share


class Engine:
    """Answers works by `workers`, in order of arrival. All methods are for the event loop's thread.

    Args:
        workers: each of its threads or processes owns its indexes: an Index is not thread-safe, nor is a user's Task.
        answer: what they run on a list of (work, time of arrival), giving an outcome for each.
        slots: their number.
    """

    def __init__(
        self,
        workers: Executor,
        answer: Callable[[list[tuple[Work[Any], float]]], list[Outcome]],
        slots: int = 1,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._workers, self._answer, self._observer = workers, answer, observer
        self.slots = self._free = slots
        self._queue: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.draining = False

    @property
    def waiting(self) -> int:
        """Requests that no worker has taken yet."""
        return len(self._queue)

    @property
    def running(self) -> bool:
        """Whether a worker is at something."""
        return bool(self._running)

    async def run(self, work: Work[T]) -> T:
        """The work's result. Work whose caller is cancelled before a worker took it never starts.

        Raises:
            DrainingError: `drain` was called.
            QueueFullError: the queue is full.
            DeadlineError: it took too long.
            QueryError, TaskError, IndexUnavailableError, OutOfMemoryError: as the work raised them.
            WorkerLostError: the process that was at it was killed.
            WorkFailedError: the work raised anything else.
        """
        if self.draining:
            raise DrainingError
        if len(self._queue) >= self.limits.queue_size:
            self._queue = deque(one for one in self._queue if not one.answer.done())
        if len(self._queue) >= self.limits.queue_size:
            raise QueueFullError
        waiting = _Waiting(work, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._dispatch()
        try:
            return cast(T, await asyncio.wait_for(waiting.answer, self.limits.deadline))
        except asyncio.TimeoutError:
            raise DeadlineError from None

    async def drain(self) -> None:
        """Refuse new work from now on, and wait until what was taken in is answered."""
        self.draining = True
        while self._running:
            await asyncio.wait(self._running)

    def _dispatch(self) -> None:
        """Give every free worker something to do."""
        while self._free and self._queue:
            self._free -= 1
            running = asyncio.ensure_future(self._work_once())
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _work_once(self) -> None:
        if self.limits.batch_wait_ms:
            await asyncio.sleep(self.limits.batch_wait_ms / 1000.0)
        try:
            batch = self._take()
            if batch:
                await self._compute(batch)
        finally:
            self._free += 1
            self._dispatch()

    def _take(self) -> list[_Waiting]:
        """The oldest request, and those that may be answered with it, as far as they fit into a batch."""
        batch: list[_Waiting] = []
        passed: list[_Waiting] = []
        room = self.limits.batch_size
        while self._queue and room > 0:
            one = self._queue.popleft()
            if one.answer.done():
                continue
            together = not batch or (one.work.kind is not None and one.work.kind == batch[0].work.kind)
            if together and (not batch or one.work.size <= room):
                batch.append(one)
                room = room - one.work.size if one.work.kind is not None else 0
            else:
                passed.append(one)
        self._queue.extendleft(reversed(passed))
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        works = [(one.work, one.arrived) for one in batch]
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._workers, self._answer, works)
        except Exception as error:  # the worker itself is gone
            outcomes = [error] * len(batch)
        took = time.perf_counter() - started
        for one, outcome in zip(batch, outcomes, strict=True):
            if not one.answer.done():
                _settle(one.answer, outcome)
        if self._observer is not None:
            waited = [started - one.arrived for one in batch]
            self._observer.answered([one.work for one in batch], waited, took, outcomes)

    def close(self) -> None:
        """Drop what still waits. Work that did not end while draining is left to itself."""
        for one in self._queue:
            one.answer.cancel()
        self._queue.clear()
        self._workers.shutdown(wait=not self.running, cancel_futures=True)


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
