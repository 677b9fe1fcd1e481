"""Trying a task's `label`, `render` and `parse` on examples: their results, or their problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gradtrace.task import Example, Task
from gradtrace.tasks.rendering import rendered

_MOST_CHARACTERS = 100  # of a value in a report


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
