"""The user's code: the line that an error came from, and checks that a task's methods return what `Task` requires."""

from __future__ import annotations

import functools
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradtrace
from gradtrace.errors import TaskError
from gradtrace.models.task_model import fresh_model
from gradtrace.task import Example, Task

_OTHER_PACKAGES = ("gradtrace_indexer", "gradtrace_service", "gradtrace_client")


def user_line(error: BaseException) -> str | None:
    """The innermost line of the user's code in the traceback of an error or its causes: "task.py, line 12, in loss:
    `x = y`". None if there is none.

    The user's code is what Gradtrace called and what is neither in Gradtrace nor in an installed library.
    """
    cause: BaseException | None = error
    while cause is not None:  # the error, its cause, the cause's cause ..., as far as a traceback shows them
        if isinstance(cause, SyntaxError) and cause.text:  # its message names file and line
            return f"`{cause.text.strip()}`"
        line = _innermost(traceback.extract_tb(cause.__traceback__))
        if line is not None:
            return line
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def running_line(thread: int) -> str | None:
    """As `user_line`, of what the thread with this `threading.get_ident` runs now. None, too, if there is no thread."""
    frame = sys._current_frames().get(thread)  # a documented function, despite its name
    return None if frame is None else _innermost(traceback.extract_stack(frame))


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str | None:
    called = dropwhile(lambda frame: not _is_in(frame.filename, _gradtrace()), frames)
    user_frames = [frame for frame in called if _is_users(frame.filename)]
    if not user_frames:
        return None
    frame = user_frames[-1]
    where = "" if frame.name == "<module>" else f", in {frame.name}"
    return f"{Path(frame.filename).name}, line {frame.lineno}{where}: `{frame.line}`"


def _is_users(filename: str) -> bool:
    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return Path(filename).is_file() and not _is_in(filename, [*libraries, *_gradtrace()])


def _is_in(filename: str, folders: Iterable[Path]) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(folder) for folder in folders)


@functools.cache
def _gradtrace() -> list[Path]:
    """Folders of Gradtrace's packages: in one folder if they are installed, each in its own in a checkout."""
    library = Path(gradtrace.__file__).resolve().parent
    checkout = [package for name in _OTHER_PACKAGES for package in library.parent.parent.glob(f"*/{name}")]
    return [library, *(library.parent / name for name in _OTHER_PACKAGES), *checkout]


def check_methods(task: Task, examples: Sequence[Example]) -> None:
    """Check the types of a task's model, class names, labels and predictions.

    examples: a few of `task.train`

    Raises:
        TaskError: names the method, what it returned and what it should return.
    """
    name = type(task).__name__
    if task.class_names is not None and not _is_words(task.class_names):
        raise TaskError(f"{name}.class_names is {task.class_names!r}: give a list of words, one for each class")
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}.model() returned {_described(model)}, not a torch.nn.Module: return the model")
    for label in map(task.label, examples):
        if label is not None and not isinstance(label, int | float):
            raise TaskError(
                f"{name}.label(example) returned {_described(label)}: return an int (a class), a float (a value) or "
                "None"
            )
    if task.has_predict:
        _check_predictions(task, examples)


def _check_predictions(task: Task, examples: Sequence[Example]) -> None:
    """Check the predictions' type and length, with untrained weights on the CPU.

    If predict raises, the passes that need predictions report it, with the trained weights on the right device.
    """
    try:
        with torch.no_grad():
            predicted = task.predict(fresh_model(task, examples).eval(), task.collate(list(examples)))
    except Exception:  # from the user's code
        return
    if not isinstance(predicted, Tensor) or not predicted.dim() or len(predicted) != len(examples):
        shape = f"a tensor {list(predicted.shape)}" if isinstance(predicted, Tensor) else _described(predicted)
        raise TaskError(
            f"{type(task).__name__}.predict(model, batch) returned {shape} for {len(examples)} examples: return a "
            "tensor of class scores [batch, classes] or of values [batch], or define no predict"
        )


def _is_words(names: Any) -> bool:
    return isinstance(names, Iterable) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _described(value: Any) -> str:
    return "None" if value is None else f"{repr(value)[:60]} of type {type(value).__name__}"
