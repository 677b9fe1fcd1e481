"""A language task as a JSON file: what `gradtrace build --model` writes beside an index, and `serve` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from gradtrace.errors import TaskError
from gradtrace.tasks.language.causal import CausalLM
from gradtrace.tasks.language.classification import SequenceClassification, TokenClassification
from gradtrace.tasks.language.options import Kind, TaskFile
from gradtrace.tasks.language.pretrained import Pretrained
from gradtrace.tasks.language.seq2seq import SequenceToSequence
from gradtrace.tasks.language.task import LanguageTask
from gradtrace.tasks.payload import listed

_CLASSES: tuple[type[LanguageTask], ...] = (CausalLM, SequenceToSequence, SequenceClassification, TokenClassification)
_TASKS: dict[Kind, type[LanguageTask]] = {task.kind: task for task in _CLASSES}


def language_task(file: TaskFile) -> LanguageTask:
    """The task that it describes.

    Raises:
        TaskError: there is no model in its directory, or its configuration does not tell the kind of task.
    """
    kind = file.kind or Pretrained(file.model).kind
    if kind is None:
        raise TaskError(
            f"{file.model}: its configuration names none of the models that are known; give kind (--kind), one of "
            f"{listed(list(_TASKS))}"
        )
    return _TASKS[kind](file.model, file.data, file.query_data, **file.options())


def read_task_file(path: Path) -> LanguageTask:
    """The task of a file. Relative paths in it begin at the file's folder.

    Raises:
        TaskError: it cannot be read, or does not describe a task.
    """
    try:
        file = TaskFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TaskError(f"{path} cannot be read ({error.strerror}); give the task's file or --task") from None
    except ValidationError as error:
        raise TaskError(
            f"{path} does not describe a task: {_described(error)}; docs/language-models.md has its form"
        ) from None
    return language_task(_with_paths(file, lambda given: path.parent.resolve() / given))


def task_file_text(file: TaskFile) -> str:
    """The content of a file, with absolute paths and the kind of task."""
    task = language_task(file)
    known = {"kind": task.kind, "reduction": task.reduction}  # whatever becomes of the model's directory
    whole = _with_paths(file, Path.resolve).model_copy(update=known)
    return whole.model_dump_json(indent=1, exclude_none=True) + "\n"


def _with_paths(file: TaskFile, resolved: Callable[[Path], Path]) -> TaskFile:
    paths = {name: resolved(value) for name, value in file if isinstance(value, Path)}
    return file.model_copy(update=paths)


def _described(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}"
