"""The task of a command: the one it names, or one of a Hugging Face model's directory and a file of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gradtrace.dry_run import weights_that_do_not_fit
from gradtrace.durable import WRITER, write_whole
from gradtrace.errors import TaskError
from gradtrace.task import Task
from gradtrace.tasks.language import (
    TASK_FILE,
    LanguageTask,
    TaskFile,
    language_task,
    rows_at_a_time,
    task_file_text,
    token_summary,
)
from gradtrace_indexer.flags import with_flags
from gradtrace_indexer.task_loading import load_task

_COUNTED_ROWS = 100_000  # at most, before a build
_BATCH_SIZE = 128  # of tasks whose examples may have any size


class NamedTask(NamedTuple):
    """file: what a task without Python code was made from; None for a task of the user's, whose name is `spec`"""

    task: Task
    file: TaskFile | None
    spec: str | None = None

    @property
    def checkpoints(self) -> Path | None:
        """Where the checkpoints are by default."""
        return None if self.file is None else self.file.model

    @property
    def load(self) -> Callable[[], Task]:
        """Makes the task anew, in another process."""
        if self.file is not None:
            return partial(language_task, self.file)
        assert self.spec is not None
        return partial(load_task, self.spec)

    def sentences(self) -> list[str]:
        """Of a language task: that its model does not fit into memory, what its rows hold, and what was cut off."""
        if not isinstance(self.task, LanguageTask):
            return []
        too_large = weights_that_do_not_fit(self.task)
        warnings = [] if too_large is None else [f"Warning: {too_large}"]
        return [*warnings, *token_summary(self.task, _COUNTED_ROWS).sentences()]

    def save(self, index: Path) -> None:
        """Write the file beside the index, so that no later command has to be told the task."""
        if self.file is not None:
            text = task_file_text(self.file)
            write_whole(index / TASK_FILE, lambda path: path.write_text(text, encoding="utf-8"), WRITER)


def with_model_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a Typer command, in place of its **flags, those that `named_task` takes."""
    return with_flags(TaskFile, TaskFile.model_fields, panel="Language models, in place of TASK")(command)


def named_task(spec: str | None, flags: Mapping[str, Any]) -> NamedTask:
    """
    Raises:
        TaskError: neither a task nor a model with data is named, or both are; or as `load_task`.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if spec is not None:
        if given:
            raise TaskError(f"give either TASK or --model with --data; beside TASK there is {_flag(next(iter(given)))}")
        return NamedTask(load_task(spec), None, spec)
    if not {"model", "data"} <= given.keys():
        raise TaskError("name the task, or give the directory of a Hugging Face model and its data: --model, --data")
    try:
        file = TaskFile(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise TaskError(f"{_flag(str(first['loc'][0]))}: {first['msg']}") from None
    return NamedTask(language_task(file), file)


def default_batch_size(task: Task) -> int:
    return rows_at_a_time(task) if isinstance(task, LanguageTask) else _BATCH_SIZE


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
