"""The results of a task's `render` as JSON values; and a trial of `label`, `render` and `parse` on examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gradtrace.errors import TaskError
from gradtrace.task import Example, Task

_MOST_CHARACTERS = 100  # of a value in a report


def rendered(task: Task, example: Example) -> dict[str, Any]:
    """`task.render(example)` in JSON values. NumPy numbers, arrays and tensors of up to one dimension become numbers
    and lists; NaN and infinities become None.

    Raises:
        TaskError: the result is not a dict, or holds a value that JSON cannot represent.
    """
    rendering = task.render(example)
    name = f"{type(task).__name__}.render"
    if not isinstance(rendering, Mapping):
        raise TaskError(
            f"{name} returns a {type(rendering).__name__}, not a dict such as "
            '{"image": data URL}, {"text": str} or {"features": {name: value}}'
        )
    json_object: dict[str, Any] = _json_value(rendering, name)
    return json_object


def _json_value(value: Any, path: str) -> Any:
    """path: of the value, such as `MyTask.render["features"][2]`, for messages"""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        if len(value.shape) > 1:
            raise TaskError(
                f"{path} is a {type(value).__name__} of shape {list(value.shape)}: return its .tolist() where it "
                "is small, an image as a data URL, by gradtrace.tasks.payload.encode_image(uint8 [height, width, "
                "channels])"
            )
        return _json_value(value.tolist(), path)
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_key(key, path): _json_value(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    binary = isinstance(value, bytes | bytearray)
    remedy = "text, such as base64.b64encode(value).decode()" if binary else "texts, numbers, lists and dicts of them"
    raise TaskError(f"{path} is {type(value).__name__}, which JSON cannot hold: return {remedy}")


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TaskError(f"{path} has the key {key!r}, and keys of JSON objects are texts: use str(key)")
    return key


class HookCheck(NamedTuple):
    """hook: the method's name.  outcome: its result or, if `problem`, the problem with its remedy"""

    hook: str
    outcome: str
    problem: bool = False


def check_hooks(task: Task, examples: Sequence[Example]) -> list[HookCheck]:
    """Try `label`, `render` and `parse` on one or more training examples. Does not raise."""
    hooks = {"label": _label, "render": _rendering, "parse": _parsed}
    return [_checked(task, hook, check, examples) for hook, check in hooks.items()]


def _checked(task: Task, hook: str, check: Callable[[Task, Example], str], examples: Sequence[Example]) -> HookCheck:
    """The outcome for the first example, or the problem of the first that fails."""
    outcomes = []
    for number, example in enumerate(examples):
        try:
            outcomes.append(check(task, example))
        except Exception as error:  # from the user's code
            where = f"{type(task).__name__}.{hook} fails on example {number} of {len(examples)} that were tried"
            return HookCheck(hook, f"{where}: {type(error).__name__}: {error}", problem=True)
    return HookCheck(hook, outcomes[0])


def _label(task: Task, example: Example) -> str:
    label = task.label(example)
    if label is None:
        return "none"
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise TypeError(f"it returns {_shortened(label)}, a {type(label).__name__}: return an int, a float or None")
    name = task.label_name(label)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"class_names has {_shortened(name)}, a {type(name).__name__}: give texts")
    return f"{label}" if name is None else f"{label} ({name})"


def _rendering(task: Task, example: Example) -> str:
    rendering = rendered(task, example)
    return _shortened(json.dumps(rendering)) if rendering else "nothing: hits are shown by row, label and score alone"


def _parsed(task: Task, example: Example) -> str:
    """Parse what `render` returns. A task's requests may have another form, in which case `parse` is not tried."""
    if type(task).parse is Task.parse:
        return "not defined: examples are asked about by query_rows or train_rows alone"
    payload = rendered(task, example)
    label = task.label(example)
    try:
        parsed = task.parse(payload if label is None else payload | {"label": label})
    except Exception as error:  # the payload may be of another form
        reason = f"{type(error).__name__}: {_shortened(str(error))}"
        return f"not tried: what render gives is not what requests hold ({reason})"
    task.collate([parsed, example])  # both must stack into one batch
    with suppress(Exception):
        task.parse(payload)
        return "reads what render gives, with and without a label"
    return "needs a label"


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."
