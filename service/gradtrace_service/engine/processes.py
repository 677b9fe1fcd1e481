"""A worker that is a process, which can be ended and replaced."""

from __future__ import annotations

import logging
import logging.config
import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import psutil

from gradtrace.child_processes import context_preloading, end_with_parent, portable
from gradtrace.errors import QueryError
from gradtrace_service.engine.work import (
    REFUSALS,
    Indexes,
    IndexUnavailableError,
    NotOpenYetError,
    Opening,
    Outcome,
    Work,
)
from gradtrace_service.engine.workers import Report, Timed, Worker, WorkerEndedError, report

_START_SECONDS = 120.0  # that a process has to start, and to import what it needs where it is not forked
_START_AGAIN_SECONDS = 2.0  # after a process that did not start; twice as long each time
_LONGEST_WAIT_SECONDS = 60.0
_END_SECONDS = 5.0
_GROWTH = 1.1  # of a process that needs more than the limit, until it is replaced

_log = logging.getLogger(__name__)


class ProcessWorker(Worker):
    """Computes in a process with indexes of its own; the stored rows are mapped from the same memory, but each process
    has its own copy of what `ProgressiveSearcher` holds.

    The two talk over a pipe: however the process ends, and in the midst of whatever, this end is told. (A queue that
    several processes share can be left locked, or with half a message, by one that is killed.) Processes that a task
    forks hold the pipe, too, and may live on, so the end of the process is told by its sentinel, and `end` shuts the
    pipe down. They are of the worker's process group, and end with it.

    Args:
        indexes: makes those of the process, in it.
        memory_limit: bytes of resident memory above which the process is replaced after a batch, unless its indexes
            need as much.
    """

    replaceable = True

    def __init__(
        self, indexes: Callable[[], Indexes], log_config: dict[str, Any], memory_limit: int | None = None
    ) -> None:
        super().__init__()
        self._arguments, self.memory_limit = (indexes, log_config), memory_limit
        self._process: psutil.Process | None = None
        self._connection: Connection[Any, Any] | None = None
        self._pipe: socket.socket | None = None  # the connection, so that another thread can shut it down
        self._started: Any = None  # `_process` as multiprocessing knows it
        self._states: dict[str, bool | None] = {}
        self._openings: dict[str, Opening] = {}
        self._needed: dict[frozenset[str], int] = {}  # memory after the first answer with these indexes open
        self._closed = threading.Event()

    @property
    def ready(self) -> bool:
        return self._connection is not None

    def states(self) -> dict[str, bool | None]:
        return self._states

    def openings(self) -> dict[str, Opening]:
        return self._openings

    @property
    def pid(self) -> int | None:
        """The process's id; None before it is started, and after it ended."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        wait_seconds = _START_AGAIN_SECONDS
        while self._connection is None and not self._closed.is_set():
            try:
                self._begin()
            except (EOFError, OSError, psutil.Error) as error:
                self._lose()
                cause = str(error) or "it ended"
                _log.error("a worker process did not start: %s. It is tried again in %d s", cause, wait_seconds)
                self._closed.wait(wait_seconds)
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)

    def _begin(self) -> None:
        context = context_preloading("gradtrace_service.indexes.preloaded")
        self._connection, theirs = context.Pipe()
        self._pipe = socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
        self._started = context.Process(target=_work, args=(theirs, *self._arguments), name="gradtrace-worker")
        self._started.start()
        theirs.close()
        self._process = psutil.Process(self._started.pid)
        if self._closed.is_set():
            self.end()
        self._receive(_START_SECONDS)  # it is ready

    def open_default(self) -> None:
        try:
            self._begin()
            outcome = self._ask(None)
        except (EOFError, OSError, psutil.Error, WorkerEndedError) as error:
            self._lose()
            cause = str(error) or "it ended: memory may not suffice, or the task ends it"
            raise IndexUnavailableError(f"the worker process did not start: {cause}") from error
        if isinstance(outcome, Exception):
            raise outcome

    def answer(self, works: Timed) -> Report:
        sent = [_pickled(work, arrived) for work, arrived in works]
        reply: Report = self._ask([content for content in sent if isinstance(content, bytes)])
        computed = iter(reply.outcomes)
        self._states, self._openings = reply.states, reply.openings
        self._replace_if_large(reply)
        outcomes = [next(computed) if isinstance(content, bytes) else content for content in sent]
        return replace(reply, outcomes=outcomes)

    def _ask(self, message: Any) -> Any:
        taken = False
        try:
            if self._connection is None:
                raise EOFError
            self._connection.send(message)
            taken = self._receive()
            return self._receive()
        except (EOFError, OSError):
            self._lose()
            raise WorkerEndedError(taken) from None
        except BaseException:  # such as MemoryError: half a message may be in the pipe
            self._lose()
            raise

    def _receive(self, seconds: float | None = None) -> Any:
        """What the process sends next. Raises EOFError or OSError if it ended, or sent nothing for so many seconds."""
        assert self._connection is not None
        ready = wait([self._connection, self._started.sentinel], seconds)
        if not ready:
            raise TimeoutError(f"it hangs, or was stopped, and is ended after {seconds} s")
        if self._connection not in ready:
            raise EOFError
        return self._connection.recv()

    def _replace_if_large(self, reply: Report) -> None:
        """A process that has just opened its indexes and answered needs what it holds: another would hold as much."""
        if self.memory_limit is None:
            return
        indexes = frozenset(name for name, is_open in reply.states.items() if is_open)
        if indexes not in self._needed:
            if all(isinstance(outcome, Exception) for outcome in reply.outcomes):
                return  # nothing was computed yet
            self._needed[indexes] = reply.memory
            if reply.memory > self.memory_limit:
                _log.warning(
                    "worker process %s holds %d MB after its first answer, more than worker_memory_limit_mb: raise "
                    "that; the process is replaced when it has grown by a tenth",
                    self.pid,
                    reply.memory >> 20,
                )
        elif reply.memory > max(self.memory_limit, self._needed[indexes] * _GROWTH):
            _log.warning(
                "worker process %s holds %d MB, more than worker_memory_limit_mb: it is replaced",
                self.pid,
                reply.memory >> 20,
            )
            self._lose()

    def _lose(self) -> None:
        self.end()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._pipe = self._process = None
        self._states, self._openings, self._needed = {}, {}, {}

    def end(self) -> None:
        process, pipe = self._process, self._pipe
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil makes sure that the id is not that of another process by now
            with suppress(ProcessLookupError, PermissionError):  # of a group that is gone, or that never was
                os.killpg(process.pid, signal.SIGKILL)
        if pipe is not None:
            with suppress(OSError), pipe:  # it is closed already, or the process has closed its end
                pipe.shutdown(socket.SHUT_RDWR)

    def close(self, wait: bool) -> None:
        self._closed.set()
        process = self._process
        self.end()
        super().close(wait)
        if process is not None:
            with suppress(psutil.TimeoutExpired):
                process.wait(_END_SECONDS)


def _pickled(work: Work[Any], arrived: float) -> bytes | QueryError:
    try:
        return pickle.dumps((work, arrived))
    except RecursionError:
        return QueryError("the request is nested too deeply: send lists and objects within each other at most 100 deep")


def _work(connection: Connection[Any, Any], indexes: Callable[[], Indexes], log_config: dict[str, Any]) -> None:
    """The process: answers batches until the service closes its end, or ends."""
    os.setsid()  # a process group of its own, for what a task forks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C, and a supervisor's SIGTERM, may reach the whole group; the
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service ends its workers itself, when all is answered
    logging.config.dictConfig(log_config)
    end_with_parent(lambda: os.killpg(0, signal.SIGKILL))  # with what a task forked
    opened = indexes()
    connection.send(None)
    with suppress(EOFError, OSError):
        while True:
            message = connection.recv()
            connection.send(True)  # it is taken: a process that ended before, while it had nothing to do, is no
            connection.send(_reply(opened, message))  # fault of this batch
    os._exit(0)  # whatever threads a task may have left


def _reply(indexes: Indexes, message: list[bytes] | None) -> Report | Exception | None:
    if message is not None:
        computed = report(indexes, [pickle.loads(content) for content in message])
        return replace(computed, outcomes=[_portable(outcome) for outcome in computed.outcomes])
    try:
        indexes.open_default()
    except Exception as error:
        return cast(Exception, _portable(error))
    return None


def _portable(outcome: Outcome) -> Outcome:
    """Errors that are none of a request are for the log: their tracebacks, which pickle loses."""
    if not isinstance(outcome, Exception):
        return outcome
    if isinstance(outcome, (*REFUSALS, NotOpenYetError)):
        return portable(outcome)
    return RuntimeError("".join(traceback.format_exception(outcome)))
