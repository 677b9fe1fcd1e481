"""Shards that are processes of this machine."""

from __future__ import annotations

import gc
import pickle
import signal
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from logging import getLogger
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from gradtrace.child_processes import context_preloading, end_with_parent, portable
from gradtrace.sharded.server import Question, ShardOpening, ShardServer
from gradtrace.sharded.transport import Failure, ShardTransport, answered, lost, unless_failed

T = TypeVar("T")

_END_SECONDS = 5.0
_LOST = (EOFError, OSError)  # what talking to a process raises that has ended

_log = getLogger(__name__)


class ProcessShards(ShardTransport):
    """A process for each shard, which ends with this one, or when nobody holds the shards any more."""

    def __init__(self, openings: Sequence[ShardOpening]) -> None:
        """Raises what a shard raises that cannot be opened."""
        self._shards = [_ShardProcess(opening) for opening in openings]
        self._finalizer = weakref.finalize(self, _end, self._shards)
        try:
            for shard in self._shards:
                shard.start()
            for shard in self._shards:
                self._opened(shard)
        except BaseException:
            self.close()
            raise

    def _opened(self, shard: _ShardProcess) -> None:
        """Wait until it answers."""
        try:
            unless_failed(shard.receive())
        except _LOST:
            raise lost(shard.opening, "its process ended while it was opened") from None

    def ask(self, questions: Mapping[int, Question[T]]) -> list[T]:
        contents = {number: pickle.dumps(question) for number, question in questions.items()}
        replies = self._replies(contents)
        missing = contents.keys() - replies.keys()
        for number in missing:
            self._restart(self._shards[number])
        replies |= self._replies({number: contents[number] for number in missing})
        for number in missing - replies.keys():
            raise lost(self._shards[number].opening, "its process ended on this question, and again when started anew")
        return [unless_failed(replies[number]) for number in questions]

    def _replies(self, contents: Mapping[int, bytes]) -> dict[int, Any]:
        """Of the shards that did not end. All are awaited: none owes a reply to an earlier question."""
        replies: dict[int, Any] = {}
        try:
            asked = [number for number, content in contents.items() if self._shards[number].send(content)]
            for number in asked:
                with suppress(*_LOST):
                    replies[number] = self._shards[number].receive()
        except BaseException:  # Ctrl-C, or a lack of memory: half a reply may be on its way
            _end(self._shards[number] for number in contents)
            raise
        return replies

    def _restart(self, shard: _ShardProcess) -> None:
        _log.warning("the process of the shard with %s ended; it is started again", shard.opening)
        try:
            shard.start()
            unless_failed(shard.receive())
        except _LOST:
            raise lost(shard.opening, "its process ended, and again when started anew") from None
        except Exception as error:
            raise lost(shard.opening, f"its process ended, and the rows cannot be opened again ({error})") from error

    def close(self) -> None:
        self._finalizer()

    @property
    def pids(self) -> list[int | None]:
        """The ids of the processes; None where one ended."""
        return [shard.pid for shard in self._shards]


class _ShardProcess:
    """The process of one shard, or none."""

    def __init__(self, opening: ShardOpening) -> None:
        self.opening = opening
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start another. It sends None when it is open, or the Failure."""
        self.end()
        context = context_preloading(ShardServer.__module__)
        self._connection, theirs = context.Pipe()
        with theirs:
            # A daemon: Python ends it at its own exit. What is sent is pickled here, since the Connection would share
            # tensors by files that stay open.
            self._process = context.Process(target=_serve, args=(theirs, self.opening), name="gradtrace-shard")
            self._process.daemon = True
            self._process.start()

    def send(self, content: bytes) -> bool:
        """Whether there is a process to answer."""
        if self._connection is None:
            return False
        try:
            self._connection.send_bytes(content)
        except OSError:
            self.end()
            return False
        return True

    def receive(self) -> Any:
        """What it sends next. Raises EOFError or OSError where it ended."""
        try:
            assert self._connection is not None  # it was started
            if self._connection not in wait([self._connection, self._process.sentinel]):
                raise EOFError
            return pickle.loads(self._connection.recv_bytes())
        except _LOST:
            self.end()
            raise

    def end(self) -> None:
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.join(_END_SECONDS)


def _end(shards: Iterable[_ShardProcess]) -> None:
    for shard in shards:
        shard.end()


def _serve(connection: Connection[Any, Any], opening: ShardOpening) -> None:
    """The process: answers until the other end is closed, or its process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever asks ends the shards
    end_with_parent()
    torch.set_num_threads(opening.threads)
    server: ShardServer | None = None
    with suppress(*_LOST):
        try:
            server = ShardServer(opening)
        except Exception as error:
            connection.send_bytes(pickle.dumps(Failure(portable(error))))
        else:
            gc.freeze()  # modules and rows are never garbage: to look at all of them again takes longer than a search
            connection.send_bytes(pickle.dumps(None))
        while server is not None:
            connection.send_bytes(pickle.dumps(answered(server, pickle.loads(connection.recv_bytes()))))
