"""Targets that name classes: the loss at a label that is not the query's, or the difference of the losses at two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gradtrace.errors import GradtraceError, QueryError
from gradtrace.task import Example, Label, Task

# "loss"; or {"label": c} for the loss at a label, by number or name of a class; or {"label": c, "rather_than": d}.
Target = Literal["loss"] | Mapping[str, Any]
_FIELDS = ("label", "rather_than")


@dataclass(frozen=True, slots=True)
class TargetLabels:
    """The labels at which the loss is explained, as numbers."""

    label: Label
    rather_than: Label | None = None

    @property
    def all(self) -> tuple[Label, ...]:
        return (self.label,) if self.rather_than is None else (self.label, self.rather_than)

    def described(self, task: Task) -> str:
        first, *others = (f"loss at the label {task.label_name(label) or f'{label:g}'}" for label in self.all)
        return " minus ".join([first, *others])


def target_labels(target: Mapping[str, Any], task: Task, classes: int | None) -> TargetLabels:
    """The numbers of the labels that a target names. classes: how many there are; None: labels are values

    Raises:
        QueryError: the target is not a {"label": ..., "rather_than": ...}, or names what is no label.
    """
    unknown = [name for name in target if name not in _FIELDS]
    if unknown or target.get("label") is None:
        problem = f"has no {unknown[0]!r}" if unknown else "names no label"
        raise QueryError(
            f'a target {problem}; give {{"label": ...}}, with "rather_than": ... for a contrast, or "loss"'
        )
    given = {name: value for name, value in target.items() if value is not None}
    labels = TargetLabels(**{name: _label(value, task, classes) for name, value in given.items()})
    if labels.label == labels.rather_than:
        raise QueryError("label and rather_than of a target are the same, so there is no difference to explain")
    return labels


def relabelled(task: Task, example: Example, labels: TargetLabels) -> tuple[Example, ...]:
    """The example with each of the labels.

    Raises:
        QueryError: the task's labels cannot be replaced.
    """
    try:
        return tuple(task.with_label(example, label) for label in labels.all)
    except Exception as error:  # whatever the user's code raises
        reason = str(error) if isinstance(error, GradtraceError) else f"{type(error).__name__}: {error}"
        raise QueryError(f"a target names a label, which cannot take the place of the example's: {reason}") from error


def check_replaceable(task: Task, example: Example, labels: TargetLabels) -> None:
    """Raises QueryError where the labels of training rows, of which `example` is one, cannot be replaced."""
    if task.label(example) is None:
        raise QueryError(
            f"a target names a label, and an example of {type(task).__name__} has none that is one number: leave "
            "target out, or define label(self, example) and with_label(self, example, label)"
        )
    relabelled(task, example, labels)


def _label(value: Any, task: Task, classes: int | None) -> Label:
    names = list(task.class_names or ())
    if isinstance(value, str) and value in names:
        return names.index(value)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is not None and classes is None and abs(number) < float("inf"):
        return number
    if number is not None and classes is not None and 0 <= number < classes and number == int(number):
        return int(number)
    # Not the value as a whole: it may be of any length.
    raise QueryError(f"the target names label {str(value)[:60]!r}; give {_choices(names, classes)}")


def _choices(names: list[str], classes: int | None) -> str:
    if classes is None:
        return "a finite number: the labels of this task are values"
    shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    return f"a class from 0 to {classes - 1}" + (f", or one of the names {shown}" if names else "")
