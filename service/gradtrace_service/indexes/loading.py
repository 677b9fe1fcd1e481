"""Loading the tasks of several indexes, which are opened at the same time."""

from __future__ import annotations

import threading

from gradtrace import Task
from gradtrace_indexer.task_loading import load_task

_TURN_SECONDS = 20.0  # that one which is being loaded keeps others waiting: it may hang

_turn = threading.Lock()


def load_in_turn(spec: str) -> Task:
    """The task, loaded anew; one at a time, since each takes the modules that it imports from the others'.

    Raises:
        TaskError: as `load_task`.
    """
    has_turn = _turn.acquire(timeout=_TURN_SECONDS)
    try:
        return load_task(spec, anew=True)
    finally:
        if has_turn:
            _turn.release()
