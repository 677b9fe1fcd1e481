"""Workers that are processes of this machine. One that is killed is started again."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from gradtrace.errors import StoreError
from gradtrace_indexer.work.payload import Payload
from gradtrace_indexer.work.sharing import Rank
from gradtrace_indexer.work.watching import Watch

_POLL_SECONDS = 0.1
_END_SECONDS = 5.0
_MOST_LOSSES = 10  # of workers in succession, while no step is done


def run_in_processes(payload: Payload, count: int, watch: Watch) -> None:
    """Have `count` processes make the call, each with its rank, until one of them comes to its end.

    Raises:
        StoreError: processes are killed again and again.
        Exception: what a call raises.
    """
    with ExitStack() as ended:
        workers = [_Worker(payload, Rank(number, count), ended) for number in range(count)]
        losses = steps = 0
        while True:
            time.sleep(_POLL_SECONDS)
            watch.look()
            if watch.steps_done > steps:
                losses, steps = 0, watch.steps_done
            for place, worker in enumerate(workers):
                if (code := worker.code()) is None:
                    continue
                outcome = worker.outcome()
                if outcome is None:
                    losses += 1
                    _refuse_many(losses, code)
                    workers[place] = _Worker(payload, worker.rank, ended)
                elif isinstance(outcome, Exception):
                    raise outcome
                else:
                    return


def _refuse_many(losses: int, code: int) -> None:
    if losses >= _MOST_LOSSES:
        cause = f"signal {-code}" + (", perhaps by the system for lack of memory" if code == -9 else "")
        raise StoreError(
            f"{losses} worker processes in succession ended before they had done a step (the last by "
            f"{cause if code < 0 else f'exit code {code}'}): share the work among fewer workers, or lower the batch "
            "size; what is done stays, and the next run resumes"
        )


class _Worker:
    """A process, ended with `ended` if not before."""

    def __init__(self, payload: Payload, rank: Rank, ended: ExitStack) -> None:
        self.rank = rank
        read, write = os.pipe()
        command = [sys.executable, "-c", f"from {__name__} import work; work({write})"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write])
        os.close(write)
        self._outcome = os.fdopen(read, "rb")
        ended.callback(self._end)
        assert self._process.stdin is not None
        self._feeder = threading.Thread(target=self._feed, args=(self._process.stdin, (payload, rank)), daemon=True)
        self._feeder.start()

    @staticmethod
    def _feed(stdin: Any, message: object) -> None:
        """It stays open, so that the process sees when this one has ended."""
        with suppress(BrokenPipeError):
            pickle.dump(message, stdin)
            stdin.flush()

    def code(self) -> int | None:
        return self._process.poll()

    def outcome(self) -> object:
        """What the call of a process that has ended raised, or True; None: it was lost."""
        content = self._outcome.read()
        return pickle.loads(content) if content else None

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(_END_SECONDS)
        self._outcome.close()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def work(outcome: int) -> None:
    """The process. outcome: the descriptor that what becomes of the call is written to"""
    stdin = sys.stdin.buffer
    message: tuple[Payload, Rank] = pickle.load(stdin)
    threading.Thread(target=_end_with_parent, args=(stdin,), daemon=True).start()
    logging.basicConfig(format=f"worker {message[1].number}: %(message)s")
    logging.captureWarnings(True)
    with os.fdopen(outcome, "wb") as file:
        file.write(_called(message[0].unpacked, message[1]))
    os._exit(0)  # whatever threads a task may have left


def _called(unpacked: Callable[[], Callable[[Rank], object]], rank: Rank) -> bytes:
    try:
        unpacked()(rank)
        return pickle.dumps(True)
    except Exception as error:
        with suppress(Exception):
            return _portable(error)
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _portable(error: Exception) -> bytes:
    """Raises where it cannot be pickled and read again."""
    content = pickle.dumps(error)
    pickle.loads(content)
    return content


def _end_with_parent(stdin: Any) -> None:
    stdin.read()
    os._exit(1)
