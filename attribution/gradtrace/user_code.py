"""Where in the user's own code an error came from, and whether a task's methods give what `Task` asks for."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradtrace
from gradtrace.errors import TaskError
from gradtrace.models.task_model import fresh_model
from gradtrace.task import Example, Task

_ROOMS = ("gradtrace_indexer", "gradtrace_service", "gradtrace_client")


def user_line(error: BaseException) -> str | None:
    """The innermost line of code on an error's way, or on that of its cause, that Gradtrace called and that is neither
    its own nor of an installed library: "task.py, line 12, in loss: `x = y`". None where there is none."""
    for cause in _causes(error):
        if isinstance(cause, SyntaxError) and cause.text:  # whose text names file and line
            return f"`{cause.text.strip()}`"
        called = dropwhile(lambda frame: not _is_in(frame.filename, _gradtrace()), _frames(cause))
        users = [frame for frame in called if _is_users(frame.filename)]
        if users:
            frame = users[-1]
            where = "" if frame.name == "<module>" else f", in {frame.name}"
            return f"{Path(frame.filename).name}, line {frame.lineno}{where}: `{frame.line}`"
    return None


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from, as a traceback tells it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _is_users(filename: str) -> bool:
    return Path(filename).is_file() and not _is_in(filename, [*_libraries(), *_gradtrace()])


def _is_in(filename: str, folders: Iterable[Path]) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(folder) for folder in folders)


@functools.cache
def _libraries() -> list[Path]:
    """Folders of Python and of what is installed."""
    return [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


@functools.cache
def _gradtrace() -> list[Path]:
    """Folders of the rooms: side by side where they are installed, in folders of their own in a checkout."""
    library = Path(gradtrace.__file__).resolve().parent
    checkout = [room for name in _ROOMS for room in library.parent.parent.glob(f"*/{name}")]
    return [library, *(library.parent / name for name in _ROOMS), *checkout]


def check_methods(task: Task, examples: Sequence[Example]) -> None:
    """See that a task's model, class names, labels and predictions are of the kinds that `Task` asks for.

    examples: a few of `task.train`

    Raises:
        TaskError: names the method, what it gave and what it should give.
    """
    name = type(task).__name__
    if task.class_names is not None and not _is_words(task.class_names):
        raise TaskError(f"{name}.class_names is {task.class_names!r}: give a list of words, one for each class")
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}.model() returned {_told(model)}, not a torch.nn.Module: return the model")
    for label in map(task.label, examples):
        if label is not None and not isinstance(label, int | float):
            raise TaskError(
                f"{name}.label(example) returned {_told(label)}: return an int (a class), a float (a value), or None"
            )
    if task.has_predict:
        _check_predictions(task, examples)


def _check_predictions(task: Task, examples: Sequence[Example]) -> None:
    """Of what is not weights or devices: an error here is left to the passes that need predictions, and is raised there
    with the trained weights on the right device."""
    try:
        with torch.no_grad():
            predicted = task.predict(fresh_model(task, examples).eval(), task.collate(list(examples)))
    except Exception:  # whatever the user's code raises
        return
    if not isinstance(predicted, Tensor) or not predicted.dim() or len(predicted) != len(examples):
        shape = f"a tensor {list(predicted.shape)}" if isinstance(predicted, Tensor) else _told(predicted)
        raise TaskError(
            f"{type(task).__name__}.predict(model, batch) returned {shape} for {len(examples)} examples: return a "
            "tensor of class scores [batch, classes] or of values [batch], or define no predict"
        )


def _is_words(names: Any) -> bool:
    return isinstance(names, Iterable) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _told(value: Any) -> str:
    return "None" if value is None else f"{repr(value)[:60]} of type {type(value).__name__}"
