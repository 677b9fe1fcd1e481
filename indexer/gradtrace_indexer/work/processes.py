"""Workers that are processes of this machine. One that is killed is started again."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradtrace.child_processes import portable
from gradtrace.durable import write_whole
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
        folder = Path(ended.enter_context(TemporaryDirectory(prefix="gradtrace-")))
        workers = [_Worker(payload, Rank(number, count), folder / str(number), ended) for number in range(count)]
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
                    workers[place] = _Worker(payload, worker.rank, folder / str(place), ended)
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
    """A process, ended with `ended` if not before. outcome: the file that it writes what becomes of the call to"""

    def __init__(self, payload: Payload, rank: Rank, outcome: Path, ended: ExitStack) -> None:
        self.rank, self._outcome = rank, outcome
        outcome.unlink(missing_ok=True)
        # As here, and without the working directory, in which a file may have the name of a library's module.
        command = f"import sys; sys.path[:] = {payload.path!r}; from {__name__} import work; work({str(outcome)!r})"
        self._process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE)
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
        return pickle.loads(self._outcome.read_bytes()) if self._outcome.exists() else None

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(_END_SECONDS)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def work(outcome: str) -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the process that waits ends this one
    message: tuple[Payload, Rank] = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format=f"worker {message[1].number}: %(message)s")
    logging.captureWarnings(True)
    content = _called(message[0].unpacked, message[1])
    write_whole(Path(outcome), lambda path: path.write_bytes(content))
    os._exit(0)  # whatever threads a task may have left


def _called(unpacked: Callable[[], Callable[[Rank], object]], rank: Rank) -> bytes:
    try:
        unpacked()(rank)
        return pickle.dumps(True)
    except BaseException as error:  # a task may also end the program
        return pickle.dumps(portable(error))


def _end_with_parent() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock processes that are forked would wait for
        pass
    os._exit(1)
