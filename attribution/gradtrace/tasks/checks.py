"""What the optional parts of a task that people see give for some examples, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradtrace.task import Example, Task
from gradtrace.tasks.rendering import rendered

_SHOWN = 100  # characters of a value in a report


class HookCheck(NamedTuple):
    """hook: its name in the task;  outcome: what it gives, or what is wrong and the remedy;  problem: which of them"""

    hook: str
    outcome: str
    problem: bool = False


def check_hooks(task: Task, examples: Sequence[Example]) -> list[HookCheck]:
    """Try `label`, `render` and `parse` on training examples, at least one. Raises nothing."""
    return [
        _checked(task, "label", _label, examples),
        _checked(task, "render", _rendering, examples),
        _checked(task, "parse", _parsed, examples),
    ]


def _checked(task: Task, hook: str, check: Callable[[Task, Example], str], examples: Sequence[Example]) -> HookCheck:
    """What is said of the first example, or what is wrong with the first that fails."""
    outcomes = []
    for number, example in enumerate(examples):
        try:
            outcomes.append(check(task, example))
        except Exception as error:  # whatever a user's code raises
            where = f"{type(task).__name__}.{hook} fails on example {number} of {len(examples)} that were tried"
            return HookCheck(hook, f"{where}: {type(error).__name__}: {error}", problem=True)
    return HookCheck(hook, outcomes[0])


def _label(task: Task, example: Example) -> str:
    label = task.label(example)
    if label is None:
        return "none"
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise TypeError(f"it returns {_shown(label)}, a {type(label).__name__}: return an int, a float or None")
    name = task.label_name(label)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"class_names has {_shown(name)}, a {type(name).__name__}: give texts")
    return f"{label}" if name is None else f"{label} ({name})"


def _rendering(task: Task, example: Example) -> str:
    rendering = rendered(task, example)
    return _shown(json.dumps(rendering)) if rendering else "nothing: hits are shown by row, label and score alone"


def _parsed(task: Task, example: Example) -> str:
    """Requests have a form of the task's own; where that is what `render` gives, the example is read back from it."""
    if type(task).parse is Task.parse:
        return "not defined: examples are asked about by query_rows or train_rows alone"
    payload = rendered(task, example)
    try:
        read = _with_label(task, payload, task.label(example))
    except Exception as error:  # of a form that it may rightly not know
        return f"not tried: what render gives is not what requests hold ({type(error).__name__}: {_shown(str(error))})"
    task.collate([read, example])  # both must stack into one batch
    return "reads what render gives, with and without a label" if _reads(task, payload) else "needs a label"


def _with_label(task: Task, payload: dict[str, Any], label: int | float | None) -> Example:
    return task.parse(payload if label is None else payload | {"label": label})


def _reads(task: Task, payload: dict[str, Any]) -> bool:
    try:
        task.parse(payload)
    except Exception:
        return False
    return True


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
