"""The indexes that the service offers: their names, directories and tasks, and how one is opened."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradtrace
from gradtrace import Index
from gradtrace.errors import GradtraceError, QueryError, StoreError, TaskError
from gradtrace.store.index_files import VerifiedFiles, changed_since
from gradtrace.store.manifest import MANIFEST_NAME, Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer.task_loading import spec_of
from gradtrace_service.answers.rendering import try_rendering
from gradtrace_service.engine.work import is_out_of_memory
from gradtrace_service.errors import FieldError
from gradtrace_service.indexes.loading import load_in_turn
from gradtrace_service.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hosted:
    """An index that the service offers."""

    name: str
    path: Path
    task: str  # as `load_task` takes it
    checkpoints: list[Path] | None = None
    device: str = "auto"
    shards: int = 0
    ray: str | None = None

    def open(self, verified: VerifiedFiles | None = None) -> Index:
        """With a new task: generations differ in their data sets, and only one thread may use a task.

        verified: as of `gradtrace.open_index`

        Raises:
            GradtraceError: see `load_task` and `gradtrace.open_index`; or its rows cannot be rendered; or its files
                were changed meanwhile.
        """
        verified = {} if verified is None else verified
        index = gradtrace.open_index(
            self.path,
            load_in_turn(self.task),
            checkpoints=self.checkpoints,
            device=self.device,
            verified=verified,
            shards=self.shards,
            ray=self.ray,
        )
        try_rendering(index)
        if changed := changed_since(index.directory, {file: verified[file] for file in index.manifest.files()}):
            raise StoreError(f"{were(changed)} written to or replaced while the index was opened: open it again")
        return index

    def open_or_say_why(self, verified: VerifiedFiles | None = None) -> Index:
        """As `open`, for whoever starts a program.

        Raises:
            GradtraceError: also for what a user's task raised.
        """
        try:
            return self.open(verified)
        except (GradtraceError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise TaskError(f"{self.task}: {described(error)}") from error

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


def described(error: BaseException) -> str:
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
    """The indexes that the command line names: DIRECTORY or NAME=DIRECTORY, with one task for each or one for all; none
    where each has a file of its task.

    Raises:
        StoreError: two have the same name, or a directory holds no index.
        QueryError: the number of tasks is neither one nor that of the indexes.
        TaskError: no task is given, and an index has no file of its task.
    """
    if len(tasks) not in (0, 1, len(indexes)):
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
    given: list[str | None] = [*tasks] if len(tasks) > 1 else [next(iter(tasks), None)] * len(paths)
    return [
        Hosted(name, path, spec_of(path, task), settings.checkpoints, settings.device, settings.shards, settings.ray)
        for name, path, task in zip(names, paths, given, strict=True)
    ]


def known_name(hosted: Mapping[str, object], name: str | None) -> str:
    """The name, None meaning the first index. Raises FieldError where no index has it."""
    if name is None:
        return next(iter(hosted))
    if name not in hosted:
        raise FieldError("index", f"there is no index {name!r}; this service has {', '.join(hosted)}")
    return name


def were(names: Sequence[str]) -> str:
    """The subject of a sentence about files, with its verb."""
    return f"{names[0]} was" if len(names) == 1 else f"{names[0]} and {len(names) - 1} others were"
