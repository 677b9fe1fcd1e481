"""How answers show examples."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np

from gradtrace import Index, Task
from gradtrace.errors import TaskError
from gradtrace.task import Example
from gradtrace.tasks.rendering import rendered
from gradtrace_client.schemas import Payload
from gradtrace_service.engine.memory import is_out_of_memory

Show = Callable[[int], Payload | None]  # training row -> its rendering, None where it was not asked for

_KEPT_CHARACTERS = 64 << 20
_TRIED_ROWS = 3

_log = logging.getLogger(__name__)


class RenderedRows:
    """Renders examples, and keeps the training rows shown last: some are hits of many queries.

    An example that cannot be rendered does not fail the answer: its rendering is {"error": why}, and the log has the
    first failure of each kind.

    kept: characters of renderings, written out, that are kept at most
    """

    def __init__(self, task: Task, kept: int = _KEPT_CHARACTERS) -> None:
        self._task, self._room = task, kept
        self._rows: OrderedDict[int, tuple[Payload, int]] = OrderedDict()  # with their sizes, the last shown at the end
        self._logged: set[type[Exception]] = set()

    def __call__(self, row: int) -> Payload:
        if row in self._rows:
            self._rows.move_to_end(row)
            return self._rows[row][0]
        try:
            rendering = rendered(self._task, self._task.train[row])
        except Exception as error:  # whatever a user's code raises
            return self._failed(f"training row {row}", error)
        self._keep(row, rendering, len(repr(rendering)))
        return rendering

    def example(self, example: Example) -> Payload:
        """Of an example that is no training row."""
        try:
            return rendered(self._task, example)
        except Exception as error:
            return self._failed("an example", error)

    def _failed(self, what: str, error: Exception) -> Payload:
        if is_out_of_memory(error):
            raise error
        if type(error) not in self._logged:
            self._logged.add(type(error))
            _log.error("%s cannot be rendered; others may fail in the same way, untold", what, exc_info=error)
        if isinstance(error, TaskError):
            return {"error": str(error)}
        return {"error": f"it cannot be rendered ({type(error).__name__}); the service's log says why"}

    def _keep(self, row: int, rendered: Payload, size: int) -> None:
        self._rows[row] = rendered, size
        self._room -= size
        while self._room < 0:
            _, (_, freed) = self._rows.popitem(last=False)
            self._room += freed


_of_indexes: WeakKeyDictionary[Index, RenderedRows] = WeakKeyDictionary()  # each goes with its generation of the index


def renderings(index: Index) -> RenderedRows:
    if index not in _of_indexes:
        _of_indexes[index] = RenderedRows(index.task)
    return _of_indexes[index]


def shower(index: Index, wanted: bool) -> Show:
    """Renders rows of `index`, or nothing where that was not asked for."""
    return renderings(index) if wanted else lambda row: None


def try_rendering(index: Index) -> None:
    """Render the first rows that are there, before anybody asks.

    Raises:
        TaskError: that fails, or gives what an answer cannot hold.
    """
    for row in np.flatnonzero(index.present)[:_TRIED_ROWS].tolist():
        try:
            rendered(index.task, index.task.train[row])
        except TaskError:
            raise
        except Exception as error:  # whatever a user's code raises
            name = f"{type(index.task).__name__}.render"
            raise TaskError(
                f"{name} fails on training row {row}: {type(error).__name__}: {error}; mend it, or leave it out: hits "
                "are then shown by row, label and score alone"
            ) from error
