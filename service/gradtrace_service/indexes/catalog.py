"""The indexes that one worker holds open: loaded at their first query, replaced when a new generation is published,
unloaded when memory runs short."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from gradtrace import Index
from gradtrace.errors import GradtraceError, MismatchError, StoreError
from gradtrace.store.index_files import VerifiedFiles, written_to
from gradtrace.user_code import running_line
from gradtrace_service.engine.slow_openings import SLOW_SECONDS, log_slow
from gradtrace_service.engine.work import (
    IndexUnavailableError,
    NoMemoryForIndexError,
    NotOpenYetError,
    Opening,
    is_out_of_memory,
)
from gradtrace_service.indexes.hosted import Hosted, described, known_name, were

_TRY_AGAIN_SECONDS = 4.0  # between two attempts to open an index that is asked for and failed to open
_RETAKE_SECONDS = 60.0  # the same for a new generation, while the old one goes on answering
_POLL_SECONDS = 1.0  # between two checks for new generations
_END_SECONDS = 5.0  # for which an index that is being opened is waited for at the end
_FIRST_USE_SECONDS = 60.0  # that an opened index is kept for the requests that waited for it

_RESTART = (
    ". The task was loaded anew, with the modules beside it. If the data on disk is right, an installed module, or one "
    "that cannot be imported twice, still holds the old data: restart the service"
)

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Offered:
    """An index of the catalog.

    index: open, and answers;  newer: opened, and to take its place at the next batch
    files: of `index`, with their stamps when they were verified;  verified: all that were found right so far
    state: `Hosted.state` of the generation that is open, or failed to open
    complaint, without_memory, failed_at: why and when it, or its newest generation, could not be opened last
    wanted: asked for, or changed, and to be opened now;  used: when it was asked for last
    unused_since: when it was opened, while no request was given it since; else None
    began, verified_at, verified_files: while it is opened, when that began, when a file was last seen to be verified,
        and how many were then;  opener: the thread that opens it
    opening: held while it is opened;  look: tells its follower that it is wanted
    """

    hosted: Hosted
    index: Index | None = None
    newer: Index | None = None
    files: VerifiedFiles = field(default_factory=dict)
    verified: VerifiedFiles = field(default_factory=dict)
    state: Any = None
    complaint: str | None = None
    without_memory: bool = False
    failed_at: float = -math.inf
    wanted: bool = False
    used: float = 0.0
    unused_since: float | None = None
    began: float | None = None
    verified_at: float = 0.0
    verified_files: int = 0
    opener: int = 0
    opening: threading.Lock = field(default_factory=threading.Lock)
    look: threading.Event = field(default_factory=threading.Event)

    def take(self, index: Index) -> None:
        """Let it answer from now on."""
        self.index, self.newer = index, None
        self.files = {entry: self.verified[entry] for entry in index.manifest.files()}

    def may_unload(self) -> bool:
        """Whether it is open, and nobody waits for its first answer. Else two could unload each other for ever."""
        is_new = self.unused_since is not None and time.monotonic() - self.unused_since < _FIRST_USE_SECONDS
        return self.index is not None and not is_new

    def begin(self) -> None:
        """This thread opens it from now on, until `began` is None again."""
        self.began = self.verified_at = time.monotonic()
        self.verified_files, self.opener = len(self.verified), threading.get_ident()

    def progress(self) -> Opening | None:
        """None where it is not being opened. Asked for once a second."""
        began, now = self.began, time.monotonic()
        if began is None:
            return None
        if len(self.verified) != self.verified_files:
            self.verified_at, self.verified_files = now, len(self.verified)
        return Opening(now - began, now - self.verified_at, running_line(self.opener))

    def drop(self) -> None:
        self.index = self.newer = self.state = None
        self.files = {}

    def may_open(self, again_after: float) -> bool:
        """Whether the index as it is on disk may open: it is another one than the one that is open or failed, or that
        failed so many seconds ago; the cause may have been a task, or a lack of memory."""
        failed_just_now = self.complaint is not None and time.monotonic() - self.failed_at <= again_after
        done = self.index is not None and self.complaint is None
        return not (done or failed_just_now) or self.hosted.state() != self.state


class Catalog:
    """Open indexes by name, for one worker.

    Indexes, and new generations beside the old ones, are opened on threads, one for each index: opening may take long,
    or hang, and keeps no other from being opened. A new generation replaces the old one between two batches: a running
    batch finishes on the old one. If the new one cannot be opened, the old one goes on answering, unless its own files
    were written to: it is then closed, until it is found right again.

    Args:
        memory_limit: bytes of the process's memory above which the least recently used indexes are unloaded; never the
            one asked for last, on which a batch may be computed.
    """

    def __init__(self, hosted: Sequence[Hosted], memory_limit: int | None = None) -> None:
        self._offered = {index.name: _Offered(index) for index in hosted}
        self._memory_limit = memory_limit
        self._lock = threading.Lock()  # guards what `_offered` holds; never held while an index is opened
        self._stopped = False
        self._followers = [
            threading.Thread(target=self._follow, args=(offered,), name="gradtrace-generations", daemon=True)
            for offered in self._offered.values()
        ]
        for follower in self._followers:
            follower.start()

    def get(self, name: str | None) -> Index:
        """The current generation of an index.

        Raises:
            FieldError: no index has this name.
            NotOpenYetError: it is being opened, from now on if need be.
            IndexUnavailableError: it cannot be opened. The next attempt is made when its files have changed, or some
                seconds later.
        """
        offered = self._named(name)
        with self._lock:
            offered.used = time.monotonic()
            if offered.newer is not None:
                offered.take(offered.newer)
            index = offered.index
            is_first_use, offered.unused_since = offered.unused_since is not None, None
        if index is None:
            self._want(offered)
            raise NotOpenYetError
        self.check(name, index)
        if is_first_use:
            self._make_room()
        return index

    def check(self, name: str | None, index: Index) -> None:
        """See `Indexes.check`: an index whose files were written to is closed, and opened again if they are right."""
        offered = self._named(name)
        self._close_if_written_to(offered)
        if offered.index is not index:  # its follower may have closed it, too
            self._want(offered)
            raise NotOpenYetError

    def open_default(self) -> None:
        """Open the first index.

        Raises:
            IndexUnavailableError: it cannot be opened.
        """
        name, offered = next(iter(self._offered.items()))
        with offered.opening:
            try:
                with _told_if_slow(offered):
                    offered.state = offered.hosted.state()
                    opened = offered.hosted.open_or_say_why(offered.verified)
            except GradtraceError as error:
                raise IndexUnavailableError(f"index {name} cannot be opened: {error}") from error
            with self._lock:
                offered.take(opened)
                offered.used = time.monotonic()

    def states(self) -> dict[str, bool | None]:
        """See `Indexes.states`; for any thread."""
        with self._lock:
            return {
                name: None if offered.index is None and offered.complaint else offered.index is not None
                for name, offered in self._offered.items()
            }

    def openings(self) -> dict[str, Opening]:
        """See `Indexes.openings`; for any thread."""
        progress = {name: offered.progress() for name, offered in self._offered.items()}
        return {name: opening for name, opening in progress.items() if opening is not None}

    def _named(self, name: str | None) -> _Offered:
        return self._offered[known_name(self._offered, name)]

    def _want(self, offered: _Offered) -> None:
        """Let the index be opened. Raises IndexUnavailableError where that failed, and is not to be tried again yet."""
        if not offered.wanted and offered.complaint is not None and not _may_open(offered, _TRY_AGAIN_SECONDS):
            kind = NoMemoryForIndexError if offered.without_memory else IndexUnavailableError
            raise kind(f"index {offered.hosted.name} cannot be opened: {offered.complaint}")
        offered.wanted = True
        offered.look.set()

    def _close_if_written_to(self, offered: _Offered) -> None:
        with self._lock:
            index, files = offered.index, offered.files
        written = [] if index is None else written_to(index.directory, files)
        if not written:
            return
        with self._lock:
            if offered.index is index:
                offered.drop()
                offered.wanted = True
        name = offered.hosted.name
        _log.error("index %s: %s written to while it was open; it answers again once found right", name, were(written))

    def _follow(self, offered: _Offered) -> None:
        while not self._stopped:
            offered.look.wait(_POLL_SECONDS)
            offered.look.clear()
            with offered.opening:
                self._look(offered)
            self._make_room()

    def _look(self, offered: _Offered) -> None:
        """Open what was asked for; a new generation of what is open; and what is written to."""
        self._close_if_written_to(offered)
        if self._stopped or not (offered.wanted or offered.index is not None or offered.complaint is not None):
            return
        opened = self._opened(offered, _RETAKE_SECONDS if offered.index is not None else _TRY_AGAIN_SECONDS)
        with self._lock:
            if opened is not None and offered.index is None:
                offered.take(opened)
                offered.unused_since = time.monotonic()
            elif opened is not None:
                offered.newer = opened
            offered.wanted = False

    def _opened(self, offered: _Offered, again_after: float) -> Index | None:
        """The index as it is on disk; None if that is open, fails to open, or failed less than `again_after` seconds
        ago."""
        try:
            if not offered.may_open(again_after):
                return None
            offered.begin()
            offered.state = offered.hosted.state()
            opened = offered.hosted.open(offered.verified)
        except BaseException as error:  # includes whatever a user's task raises
            offered.failed_at = time.monotonic()
            self._complain(offered, error)
            return None
        finally:
            offered.began = None
        offered.complaint = None
        offered.verified = {file: offered.verified[file] for file in opened.manifest.files()}
        _log.info("index %s: generation %d is ready", offered.hosted.name, opened.manifest.generation)
        return opened

    def _complain(self, offered: _Offered, error: BaseException) -> None:
        """Log an error, unless it is the one logged last."""
        complaint = described(error)
        if offered.complaint != complaint:
            goes_on = ", the old generation goes on answering" if offered.index is not None else ""
            remedy = _RESTART if goes_on and isinstance(error, MismatchError) else ""
            _log.error("index %s cannot be opened%s: %s%s", offered.hosted.name, goes_on, complaint, remedy)
        offered.complaint, offered.without_memory = complaint, is_out_of_memory(error)

    def _make_room(self) -> None:
        while self._memory_limit is not None and psutil.Process().memory_info().rss > self._memory_limit:
            with self._lock:
                asked_last = max(self._offered.values(), key=lambda offered: offered.used)
                others = [
                    offered for offered in self._offered.values() if offered.may_unload() and offered is not asked_last
                ]
                if not others:
                    return
                oldest = min(others, key=lambda offered: offered.used)
                oldest.drop()
            _log.info("unloading index %s: memory is above its limit", oldest.hosted.name)
            gc.collect()

    def close(self) -> None:
        self._stopped = True
        for offered in self._offered.values():
            offered.look.set()
        for follower in self._followers:
            follower.join(_END_SECONDS)


@contextmanager
def _told_if_slow(offered: _Offered) -> Iterator[None]:
    """Log that the index takes long to open, where nobody asks yet, and no other log line tells it."""
    offered.begin()
    timer = threading.Timer(SLOW_SECONDS, lambda: log_slow(offered.hosted.name, offered.progress()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        offered.began = None


def _may_open(offered: _Offered, again_after: float) -> bool:
    try:
        return offered.may_open(again_after)
    except StoreError:  # there is no manifest
        return False
