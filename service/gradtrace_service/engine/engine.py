"""From the event loop to the workers that own the indexes, and back.

Requests wait in one bounded queue. Whenever a worker is free, it is given the request whose turn it is together with
others that may be answered in the same pass (a micro-batch), so batches grow with the load and a lone request never
waits for company longer than `batch_wait_ms`. A request whose caller went away, or whose deadline passed, leaves the
queue. A worker that is lost, or computes beyond a limit, is replaced; `retries` has what becomes of its requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from asgi_correlation_id import correlation_id

from gradtrace_service.engine.fair_queue import FairQueue, Waiting
from gradtrace_service.engine.retries import BatchSizes, half, leave_alone, longest_pass
from gradtrace_service.engine.slow_openings import SlowOpenings
from gradtrace_service.engine.work import REFUSALS, IndexUnavailableError, NotOpenYetError, Opening, Outcome, Work
from gradtrace_service.engine.workers import Worker, WorkerEndedError
from gradtrace_service.settings import DEFAULTS, Settings

T = TypeVar("T")

# Told of every batch that was answered: its works, the seconds that each waited in the queue, the seconds of computing
# all of them, and the outcomes.
Observer = Callable[[Sequence[Work[Any]], Sequence[float], float, Sequence[Outcome]], None]

_OPENING_SECONDS = 0.05  # until requests for an index that is being opened are tried again

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as the queue holds."""


class ClientBusyError(Exception):
    """As many requests of this client wait or are computed as it may have."""


class DeadlineError(Exception):
    """The answer took longer than a request may take."""


class WorkFailedError(Exception):
    """Answering failed, and the request is not at fault. The cause is for the log, not for the caller."""


class DrainingError(Exception):
    """The service is shutting down and accepts nothing new."""


class WorkerHungError(Exception):
    """The thread that computes hangs, and the service must be started again."""


class WorkerLostError(Exception):
    """The process that computed the answer ended, twice."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that was accepted: its works, one after the other, are computed within its one deadline."""

    _answer: Callable[[Work[Any], float], Awaitable[Any]]
    _expires: float

    async def answer(self, work: Work[T]) -> T:
        """As `Engine.run`, but not refused for want of room."""
        return cast(T, await self._answer(work, self._expires))


class Engine:
    """Answers works by `workers`, each client in order of arrival. All methods are for the event loop's thread.

    Args:
        workers: each owns its indexes: an Index is not thread-safe, nor is a user's Task.
        settings: `queue_size`, `batch_size`, `batch_wait_ms`, `deadline_seconds` and `max_in_flight` are used.

    Attributes:
        computing: requests that workers have taken and not answered yet.
        leaving: the service ends soon, and should be sent nothing new; what comes is answered.
        draining: nothing new is accepted.
        hung: a worker that cannot be replaced computes beyond its limit; nothing new is accepted.
    """

    def __init__(
        self, workers: Sequence[Worker], settings: Settings = DEFAULTS, observer: Observer | None = None
    ) -> None:
        self.settings = settings
        self.workers, self._observer = workers, observer
        self._idle = list(workers)
        self._queue, self._sizes = FairQueue(), BatchSizes(settings.batch_size)
        self._in_flight: Counter[str] = Counter()
        self._running: set[asyncio.Task[None]] = set()
        self._paused: dict[Worker, dict[str | None, float]] = {worker: {} for worker in workers}
        self._added = asyncio.Event()
        self._slow = SlowOpenings()
        self.computing = 0
        self.leaving = self.draining = self.hung = False

    @property
    def waiting(self) -> int:
        """Requests that no worker has taken yet and whose caller still waits."""
        return len(self._queue)

    async def run(self, work: Work[T]) -> T:
        """The work's answer. Work whose caller is cancelled before a worker took it never starts.

        Raises:
            DrainingError: `drain` was called.
            WorkerHungError: the only worker hangs.
            ClientBusyError: the client has as many requests in flight as it may.
            QueueFullError: the queue is full.
            IndexUnavailableError: the index was given up.
            DeadlineError: it took too long.
            QueryError, TaskError, IndexUnavailableError, OutOfMemoryError: as the work raised them.
            WorkerLostError: two processes ended while they computed the answer.
            WorkFailedError: the work raised anything else.
        """
        with self.accept(work) as accepted:
            return await accepted.answer(work)

    @contextmanager
    def accept(self, work: Work[Any]) -> Iterator[Accepted]:
        """Accept a request, of which this is the first work. Raises as `run`."""
        self._refuse_or_accept(work)
        self._in_flight[work.client] += 1
        try:
            yield Accepted(self._answer, time.perf_counter() + self.settings.deadline_seconds)
        finally:
            self._in_flight -= Counter((work.client,))  # leaves out who has none

    async def _answer(self, work: Work[T], expires: float) -> T:
        if self.hung:
            raise WorkerHungError
        answer = asyncio.get_running_loop().create_future()
        waiting = Waiting(work, answer, expires, correlation_id.get())
        self._queue.add(waiting)
        self._added.set()
        self._dispatch()
        try:
            return cast(T, await asyncio.wait_for(answer, max(expires - time.perf_counter(), 0.0)))
        except asyncio.TimeoutError:
            raise DeadlineError from None
        finally:
            self._queue.discard(waiting)

    def _refuse_or_accept(self, work: Work[Any]) -> None:
        if self.draining:
            raise DrainingError
        if self.hung:
            raise WorkerHungError
        if self._slow.refuses(work.index):
            raise IndexUnavailableError
        if work.internal:
            return
        if self.settings.max_in_flight is not None and self._in_flight[work.client] >= self.settings.max_in_flight:
            raise ClientBusyError
        if self.waiting >= self.settings.queue_size:
            self._make_room(work.client)

    def _make_room(self, client: str) -> None:
        """Who fills the queue must not keep others out: its newest request is refused in place of another client's."""
        last = self._queue.newest_of_most(client)
        if last is None:
            raise QueueFullError
        last.answer.set_exception(QueueFullError())
        self._queue.discard(last)

    async def drain(self) -> None:
        """Refuse new work from now on, and wait until all accepted work is answered."""
        self.draining = True
        while self._running or self._in_flight:
            await asyncio.wait(self._running or [asyncio.ensure_future(asyncio.sleep(_OPENING_SECONDS))])

    def _dispatch(self) -> None:
        """Start a batch on every free worker that may take one."""
        for worker in [worker for worker in self._idle if self._queue.has_turn(self._pauses(worker))]:
            self._idle.remove(worker)
            running = asyncio.ensure_future(self._serve_batch(worker))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    def _pauses(self, worker: Worker) -> set[str | None]:
        """The indexes that the worker is opening."""
        now = time.perf_counter()
        self._paused[worker] = {index: until for index, until in self._paused[worker].items() if until > now}
        return set(self._paused[worker])

    async def _serve_batch(self, worker: Worker) -> None:
        try:
            await self._start(worker)
            if self.settings.batch_wait_ms:
                await asyncio.sleep(self.settings.batch_wait_ms / 1000.0)
            await self._wait_for_those_behind(worker)
            batch = self._queue.take(self._sizes.of, self._pauses(worker))
            if batch:
                await self._compute(worker, batch)
            await self._start(worker)
        finally:
            self._idle.append(worker)
            self._dispatch()

    async def _start(self, worker: Worker) -> None:
        if not worker.ready:
            await asyncio.get_running_loop().run_in_executor(worker.thread, worker.start)

    async def _wait_for_those_behind(self, worker: Worker) -> None:
        while (seconds := self._queue.expected(self._pauses(worker))) > 0:
            self._added.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._added.wait(), seconds)

    async def _compute(self, worker: Worker, batch: list[Waiting]) -> None:
        started = time.perf_counter()
        self.computing += len(batch)
        outcomes = await self._outcomes(worker, batch)
        self.computing -= len(batch)  # not where the loop is closed meanwhile: the worker computes on
        took = time.perf_counter() - started
        self._queue.charge(batch, took)
        self._sizes.note(batch, took, half(self.settings.deadline_seconds))
        answered: list[tuple[Waiting, Outcome]] = []
        for waiting, outcome in reversed(list(zip(batch, outcomes, strict=True))):
            if outcome is not _AGAIN and outcome is not _AFTER_OTHERS:
                answered.insert(0, (waiting, outcome))
            elif not waiting.answer.done():
                self._queue.add(waiting, first=outcome is _AGAIN)
        for waiting, outcome in answered:
            if not waiting.answer.done():
                _settle(waiting.answer, outcome)
        if self._observer is not None and answered:
            waited = [started - waiting.arrived for waiting, _ in answered]
            self._observer(
                [waiting.work for waiting, _ in answered], waited, took, [outcome for _, outcome in answered]
            )

    async def _outcomes(self, worker: Worker, batch: list[Waiting]) -> list[Outcome]:
        """An outcome for each request, or _AGAIN, or _AFTER_OTHERS."""
        started = time.perf_counter()
        works = [(waiting.work, waiting.arrived) for waiting in batch]
        computing = asyncio.get_running_loop().run_in_executor(worker.thread, worker.answer, works)
        in_time, _ = await asyncio.wait(
            [computing], timeout=longest_pass(batch, worker.replaceable, self.settings.deadline_seconds)
        )
        if not in_time:
            self._give_up(worker, batch)
        try:
            outcomes = (await computing).outcomes
        except WorkerEndedError as error:
            if in_time and not error.taken:
                _log.warning("a worker process had ended while it had nothing to do, and is replaced")
                return [_AGAIN] * len(batch)
            return self._after_loss(batch, not in_time, time.perf_counter() - started)
        except Exception as error:  # what was asked cannot be sent to the process
            return [error] * len(batch)
        finally:
            self.hung = self.hung and worker.replaceable
        if any(isinstance(outcome, NotOpenYetError) for outcome in outcomes):
            self._paused[worker][batch[0].work.index] = time.perf_counter() + _OPENING_SECONDS
            asyncio.get_running_loop().call_later(_OPENING_SECONDS * 1.1, self._dispatch)
        return [_AGAIN if isinstance(outcome, NotOpenYetError) else outcome for outcome in outcomes]

    def _give_up(self, worker: Worker, batch: list[Waiting]) -> None:
        """A batch has been computed for longer than it may."""
        ids = ", ".join(str(waiting.request_id) for waiting in batch)
        if worker.replaceable:
            _log.error("the worker process is ended and replaced: it computes too long; its requests: %s", ids)
            worker.end()
            return
        _log.critical("the thread that computes hangs; the service must be started again. Its requests: %s", ids)
        self.hung = True
        for waiting in self._queue:
            waiting.answer.set_exception(WorkerHungError())

    def _after_loss(self, batch: list[Waiting], late: bool, took: float) -> list[Outcome]:
        """The outcomes of requests whose worker process ended. late: because they were computed for too long"""
        if not late:
            ids = ", ".join(str(waiting.request_id) for waiting in batch)
            _log.error("a worker process ended and is replaced; its requests: %s", ids)
        if len(batch) == 1 and late:
            if batch[0].patience is None:
                return [DeadlineError()]
            batch[0].patience = None  # it has the rest of its time, once others had theirs
            return [_AFTER_OTHERS]
        lost_before = [waiting.losses for waiting in batch]
        leave_alone(batch, late, took)
        if len(batch) == 1 and lost_before[0]:
            return [WorkerLostError()]
        return [_AGAIN] * len(batch)

    def states(self) -> dict[str, bool | None]:
        """Of each index: None if a worker cannot open it, else whether one has it open."""
        merged: dict[str, bool | None] = {}
        for states in (worker.states() for worker in self.workers):
            for name, state in states.items():
                before = merged.get(name, False)
                merged[name] = None if None in (before, state) else bool(before or state)
        return merged | dict.fromkeys(self._slow.given_up())

    def openings(self) -> dict[str, Opening]:
        """Of each index that a worker is opening: the one that takes the longest."""
        merged: dict[str, Opening] = {}
        for worker in self.workers:
            for name, opening in worker.openings().items():
                merged[name] = max(merged.get(name, opening), opening, key=lambda opening: opening.seconds)
        return merged

    async def refresh(self) -> None:
        """Ask the processes that have nothing to do for the states of their indexes. One that hangs is replaced, and so
        is one in which the opening of an index hangs."""
        for worker in self.workers:
            self._give_up_openings(worker)
            if worker in self._idle and worker.ready and worker.replaceable:
                self._idle.remove(worker)
                try:
                    await self._look_at(worker)
                finally:
                    self._idle.append(worker)
                    self._dispatch()

    def _give_up_openings(self, worker: Worker) -> None:
        openings = worker.openings()
        for name in self._slow.look(openings, worker.states()):
            if not any(other.states().get(name) for other in self.workers):
                self._slow.give_up(name, openings[name])
                self._refuse_waiting(name)
            if worker.replaceable:
                _log.error("the worker process is ended and replaced: the opening of index %s hangs in it", name)
                worker.end()

    def _refuse_waiting(self, index: str) -> None:
        for waiting in self._queue:
            if waiting.work.index == index:
                waiting.answer.set_exception(IndexUnavailableError())

    async def _look_at(self, worker: Worker) -> None:
        asked = asyncio.get_running_loop().run_in_executor(worker.thread, worker.answer, [])
        in_time, _ = await asyncio.wait([asked], timeout=half(self.settings.deadline_seconds))
        if not in_time:
            _log.error("a worker process that had nothing to do is ended and replaced: it does not answer")
            worker.end()
        with suppress(WorkerEndedError):
            await asked
        await self._start(worker)

    def close(self) -> None:
        """Drop the queue, and end the workers. A thread that is still busy after draining is not waited for."""
        for waiting in self._queue:
            waiting.answer.cancel()
        for running in self._running:
            running.cancel()
        for worker in self.workers:
            worker.close(wait=not self.computing)


_AGAIN, _AFTER_OTHERS = object(), object()  # before, or after, what its client asked later


def _settle(answer: asyncio.Future[Any], outcome: Outcome) -> None:
    if not isinstance(outcome, Exception):
        answer.set_result(outcome)
    elif isinstance(outcome, (*REFUSALS, DeadlineError, WorkerLostError)):
        answer.set_exception(outcome)
    else:
        failure = WorkFailedError()
        failure.__cause__ = outcome
        answer.set_exception(failure)
