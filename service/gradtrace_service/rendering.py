"""How answers show training rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

from gradtrace import Index, Task
from gradtrace_client.schemas import Payload

Show = Callable[[int], Payload | None]  # training row -> its rendering, None where it was not asked for

_KEPT_CHARACTERS = 64 << 20


class RenderedRows:
    """Renders training rows, and keeps those shown last: some rows are hits of many queries.

    kept: characters of renderings, written out, that are kept at most
    """

    def __init__(self, task: Task, kept: int = _KEPT_CHARACTERS) -> None:
        self._task, self._room = task, kept
        self._rows: OrderedDict[int, tuple[Payload, int]] = OrderedDict()  # with their sizes, the last shown at the end

    def __call__(self, row: int) -> Payload:
        if row in self._rows:
            self._rows.move_to_end(row)
            return self._rows[row][0]
        rendered = self._task.render(self._task.train[row])
        self._keep(row, rendered, len(repr(rendered)))
        return rendered

    def _keep(self, row: int, rendered: Payload, size: int) -> None:
        self._rows[row] = rendered, size
        self._room -= size
        while self._room < 0:
            _, (_, freed) = self._rows.popitem(last=False)
            self._room += freed


_of_indexes: WeakKeyDictionary[Index, RenderedRows] = WeakKeyDictionary()  # each goes with its generation of the index


def shower(index: Index, wanted: bool) -> Show:
    """Renders rows of `index`, or nothing where that was not asked for."""
    if not wanted:
        return lambda row: None
    if index not in _of_indexes:
        _of_indexes[index] = RenderedRows(index.task)
    return _of_indexes[index]
