"""Examples as answers show them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np

from gradtrace import Index, Task
from gradtrace.errors import TaskError
from gradtrace.task import Example
from gradtrace.tasks.hooks import rendered
from gradtrace_client.schemas import Payload
from gradtrace_service.engine.work import is_out_of_memory

Renderer = Callable[[int], Payload | None]  # training row -> its rendering, None where it was not asked for

_KEPT_CHARACTERS = 64 << 20
_TRIED_ROWS = 3

_log = logging.getLogger(__name__)


class RenderedRows:
    """Renders examples, with a cache of the training rows shown last: a row may be a hit of many queries.

    An example that cannot be rendered does not fail the answer: its rendering is {"error": why}, and the log has the
    first failure of each type.

    kept: the cache's size, in characters of the renderings as text
    """

    def __init__(self, task: Task, kept: int = _KEPT_CHARACTERS) -> None:
        self._task, self._room = task, kept
        self._rows: OrderedDict[int, tuple[Payload, int]] = OrderedDict()  # rendering and size; shown last at the end
        self._logged: set[type[Exception]] = set()

    def __call__(self, row: int) -> Payload:
        if row in self._rows:
            self._rows.move_to_end(row)
            return self._rows[row][0]
        try:
            rendering = rendered(self._task, self._task.train[row])
        except Exception as error:  # whatever the user's code raises
            return self._failed(f"training row {row}", error)
        self._keep(row, rendering, len(repr(rendering)))
        return rendering

    def example(self, example: Example) -> Payload:
        """Render an example that is not a training row."""
        try:
            return rendered(self._task, example)
        except Exception as error:
            return self._failed("an example", error)

    def _failed(self, what: str, error: Exception) -> Payload:
        if is_out_of_memory(error):
            raise error
        if type(error) not in self._logged:
            self._logged.add(type(error))
            _log.error("%s cannot be rendered; further failures of this type are not logged", what, exc_info=error)
        if isinstance(error, TaskError):
            return {"error": str(error)}
        return {"error": f"it cannot be rendered ({type(error).__name__}); the service's log says why"}

    def _keep(self, row: int, rendered: Payload, size: int) -> None:
        self._rows[row] = rendered, size
        self._room -= size
        while self._room < 0:
            _, (_, freed) = self._rows.popitem(last=False)
            self._room += freed


_by_index: WeakKeyDictionary[Index, RenderedRows] = WeakKeyDictionary()  # a cache ends with its generation


def rendered_rows(index: Index) -> RenderedRows:
    if index not in _by_index:
        _by_index[index] = RenderedRows(index.task)
    return _by_index[index]


def renderer(index: Index, wanted: bool) -> Renderer:
    """Renders training rows of `index`, or nothing where that was not asked for."""
    return rendered_rows(index) if wanted else lambda row: None


def try_rendering(index: Index) -> None:
    """Render the first rows that are there, to find a broken `render` before anybody asks.

    Raises:
        TaskError: rendering fails, or gives what an answer cannot hold.
    """
    for row in np.flatnonzero(index.present)[:_TRIED_ROWS].tolist():
        try:
            rendered(index.task, index.task.train[row])
        except TaskError:
            raise
        except Exception as error:  # whatever a user's code raises
            if is_out_of_memory(error):
                raise
            name = f"{type(index.task).__name__}.render"
            raise TaskError(
                f"{name} fails on training row {row}: {type(error).__name__}: {error}; fix it, or leave it out: hits "
                "are then shown by row, label and score alone"
            ) from error
