"""Labels that people suggest."""

from __future__ import annotations

from collections.abc import Sequence

from gradtrace import Index
from gradtrace.tasks.payload import listed, shown
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError
from gradtrace_service.state.marks import SuggestedLabel


@each_alone
def named_label(index: Index, label: float | str, waited_ms: float) -> SuggestedLabel:
    """The label that is meant by a number or a class name, and its name.

    Raises:
        FieldError: the task has no such class.
    """
    names = index.task.class_names
    if isinstance(label, str):
        if label not in (names or ()):
            raise FieldError("label", f"there is no class {shown(label)}; {_remedy(names)}")
        label = list(names or ()).index(label)
    number = int(label) if float(label).is_integer() else float(label)
    name = index.task.label_name(number)
    if names is not None and name is None:
        raise FieldError("label", f"there is no class {shown(number)}; {_remedy(names)}")
    return SuggestedLabel(number, name)


def _remedy(names: Sequence[str] | None) -> str:
    return f"this index has {listed(names)}" if names else "the classes of this index have no names: give a number"
