"""The indexes that one worker holds open: loaded at their first query, replaced when a new generation is published,
unloaded when memory runs short."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import gradtrace
from gradtrace import Index
from gradtrace.errors import GradtraceError, MismatchError, QueryError, StoreError, TaskError
from gradtrace.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from gradtrace_client.service_schemas import IndexSummary
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.answers.rendering import try_rendering
from gradtrace_service.engine.work import IndexUnavailableError, NoMemoryForIndexError, is_out_of_memory
from gradtrace_service.errors import FieldError
from gradtrace_service.settings import Settings

_TRY_AGAIN_SECONDS = 4.0  # between two attempts to open an index that is asked for and failed to open
_RETAKE_SECONDS = 60.0  # the same for a new generation, while the old one goes on answering
_POLL_SECONDS = 1.0  # between two checks for new generations

_RESTART = (
    ". The task was loaded anew, with the modules beside it. If the data on disk is right, an installed module, or one "
    "that cannot be imported twice, still holds the old data: restart the service"
)

Summaries = Callable[[], list[IndexSummary]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hosted:
    """An index that the service offers."""

    name: str
    path: Path
    task: str  # module:attribute or path/to/file.py:attribute
    checkpoints: list[Path] | None = None
    device: str = "auto"

    def open(self) -> Index:
        """With a new task: generations differ in their data sets, and only one thread may use a task.

        Raises:
            GradtraceError: see `load_task` and `gradtrace.open_index`; or its rows cannot be rendered.
        """
        index = gradtrace.open_index(
            self.path, load_task(self.task, anew=True), checkpoints=self.checkpoints, device=self.device
        )
        try_rendering(index)
        return index

    def open_or_say_why(self) -> Index:
        """As `open`, for whoever starts a program.

        Raises:
            GradtraceError: also for what a user's task raised.
        """
        try:
            return self.open()
        except (GradtraceError, MemoryError):
            raise
        except Exception as error:
            raise TaskError(f"{self.task}: {_described(error)}") from error

    def manifest(self) -> Manifest | None:
        """None, and an error in the log, where it cannot be read."""
        try:
            return read_manifest(self.path)
        except GradtraceError as error:
            _log.error("index %s: %s", self.name, error)
            return None

    def state(self) -> Any:
        """A value that changes when another generation is published, or a file of this one is damaged or repaired.

        Raises:
            StoreError: there is no manifest, or it is damaged.
        """
        files = [entry.path for entry in read_manifest(self.path).files()]
        return [file_stamp(self.path / name) for name in (MANIFEST_NAME, *files)]


def _described(error: Exception) -> str:
    """The text of Gradtrace's errors; for what a user's code raised, also its type and line."""
    if is_out_of_memory(error):
        return f"memory ran out ({type(error).__name__}: {error}); give the service more, or serve fewer indexes"
    if isinstance(error, GradtraceError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever the file does; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def hosted(indexes: Sequence[str], tasks: Sequence[str], settings: Settings) -> list[Hosted]:
    """The indexes that the command line names: DIRECTORY or NAME=DIRECTORY, with one task for each or one for all.

    Raises:
        StoreError: two have the same name, or a directory holds no index.
        QueryError: the number of tasks is neither one nor that of the indexes.
    """
    if len(tasks) not in (1, len(indexes)):
        raise QueryError(f"give one --task for all {len(indexes)} indexes, or one for each, in their order")
    named = [text.partition("=") for text in indexes]
    paths = [Path(after if separator else before) for before, separator, after in named]
    names = [
        before if separator else path.resolve().name for (before, separator, _), path in zip(named, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        raise StoreError(
            f"two indexes have the same name ({', '.join(names)}); give them different ones: NAME=DIRECTORY"
        )
    for path in paths:
        read_manifest(path)
    return [
        Hosted(name, path, task, settings.checkpoints, settings.device)
        for name, path, task in zip(names, paths, tasks if len(tasks) > 1 else [*tasks] * len(paths), strict=True)
    ]


def known_name(hosted: Mapping[str, Hosted], name: str | None) -> str:
    """The name, None meaning the first index. Raises FieldError where no index has it."""
    if name is None:
        return next(iter(hosted))
    if name not in hosted:
        raise FieldError("index", f"there is no index {name!r}; this service has {', '.join(hosted)}")
    return name


class Catalog:
    """Open indexes by name, for one worker.

    A new generation is opened beside the old one, on a thread, and replaces it between two batches: a running batch
    finishes on the old one. If the new one cannot be opened, the old one goes on answering.

    Args:
        memory_limit: bytes of the process's memory above which the least recently used indexes are unloaded.
    """

    def __init__(self, hosted: Sequence[Hosted], memory_limit: int | None = None) -> None:
        self._hosted = {index.name: index for index in hosted}
        self._memory_limit = memory_limit
        self._open: OrderedDict[str, Index] = OrderedDict()  # the most recently used is last
        self._next: dict[str, Index] = {}
        self._lock = threading.Lock()  # guards the two above; never held while an index is opened
        self._states: dict[str, Any] = {}  # `Hosted.state` of the generation that is open, or failed to open
        self._complaints: dict[str, str] = {}  # the last error logged for an index that cannot be opened
        self._without_memory: set[str] = set()  # those that cannot be opened because memory ran out
        self._failed_at: dict[str, float] = {}  # when opening last failed
        self._opening = threading.Lock()  # guards the three above: one index is opened at a time
        self._stopped = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="gradtrace-generations", daemon=True)
        self._follower.start()

    def get(self, name: str | None) -> Index:
        """The current generation of an index, opened if need be.

        Raises:
            FieldError: no index has this name.
            IndexUnavailableError: it cannot be opened. The next attempt is made when its manifest has changed, or some
                seconds later: other files may have been repaired.
        """
        name = known_name(self._hosted, name)
        with self._lock:
            if name in self._next:
                self._open[name] = self._next.pop(name)
            known = name in self._open
        if not known:
            self._open_first(name)
        with self._lock:
            self._open.move_to_end(name)
            return self._open[name]

    def open_default(self) -> None:
        """Open the first index.

        Raises:
            IndexUnavailableError: it cannot be opened.
        """
        name, first = next(iter(self._hosted.items()))
        with self._opening:
            try:
                self._states[name] = first.state()
                opened = first.open_or_say_why()
            except GradtraceError as error:
                raise IndexUnavailableError(f"index {name} cannot be opened: {error}") from error
            with self._lock:
                self._open[name] = opened

    def is_open(self, name: str) -> bool:
        """Whether the index is in memory; for any thread."""
        with self._lock:
            return name in self._open

    def _open_first(self, name: str) -> None:
        with self._opening:
            opened = self._newer(name, _TRY_AGAIN_SECONDS)
            if opened is None:
                kind = NoMemoryForIndexError if name in self._without_memory else IndexUnavailableError
                raise kind(f"index {name} cannot be opened: {self._complaints[name]}")
            with self._lock:
                self._open[name] = opened
            self._make_room(name)

    def _newer(self, name: str, again_after: float) -> Index | None:
        """Open the index as it is on disk. None if that is open already, or fails to open, or failed less than
        `again_after` seconds ago; a later attempt may succeed, since the cause may be a task or a lack of memory."""
        since_failure = time.monotonic() - self._failed_at.get(name, math.inf)
        try:
            state = self._hosted[name].state()
            if state == self._states.get(name) and since_failure <= again_after:
                return None
            self._states[name] = state
            opened = self._hosted[name].open()
        except Exception as error:  # includes whatever a user's task raises
            self._failed_at[name] = time.monotonic()
            self._complain(name, error)
            return None
        self._complaints.pop(name, None)
        self._failed_at.pop(name, None)
        _log.info("index %s: generation %d is ready", name, opened.manifest.generation)
        return opened

    def _complain(self, name: str, error: Exception) -> None:
        """Log an error, unless it is the one logged last."""
        complaint = _described(error)
        if self._complaints.get(name) != complaint:
            goes_on = ", the old generation goes on answering" if name in self._open else ""
            remedy = _RESTART if goes_on and isinstance(error, MismatchError) else ""
            _log.error("index %s cannot be opened%s: %s%s", name, goes_on, complaint, remedy)
        self._complaints[name] = complaint
        (self._without_memory.add if is_out_of_memory(error) else self._without_memory.discard)(name)

    def _make_room(self, newest: str) -> None:
        while self._memory_limit is not None and len(self._open) > 1:
            if psutil.Process().memory_info().rss <= self._memory_limit:
                return
            oldest = next(name for name in self._open if name != newest)
            _log.info("unloading index %s: memory is above its limit", oldest)
            with self._lock:
                del self._open[oldest], self._states[oldest]
                self._next.pop(oldest, None)
            gc.collect()

    def _follow(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            with self._lock:
                names = list(self._open)
            for name in names:
                self._look(name)

    def _look(self, name: str) -> None:
        with self._opening:
            if name not in self._open:  # unloaded meanwhile
                return
            opened = self._newer(name, _RETAKE_SECONDS)
            if opened is not None:
                with self._lock:
                    self._next[name] = opened

    def close(self) -> None:
        self._stopped.set()
        self._follower.join()


def summaries(hosted: Sequence[Hosted], catalog: Catalog | None) -> list[IndexSummary]:
    """What the manifests say, without opening an index. catalog: None if the workers are processes"""
    return [
        summary(index.name, index.manifest(), None if catalog is None else catalog.is_open(index.name))
        for index in hosted
    ]


def summary(name: str | None, manifest: Manifest | None, loaded: bool | None) -> IndexSummary:
    if manifest is None:
        return IndexSummary(name=name, generation=None, task=None, rows=None, loaded=loaded)
    task = manifest.task
    return IndexSummary(name=name, generation=manifest.generation, task=task.name, rows=task.train_rows, loaded=loaded)
