"""What a worker process is given: a call, pickled with the classes and functions of the user's script.

A task that a command loaded by its name is loaded again in each worker; another travels as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from gradtrace.errors import StoreError


class Payload(NamedTuple):
    """call: cloudpickled, a function of the worker's rank;  path, folder: as of the process that starts the workers"""

    call: bytes
    path: list[str]
    folder: str

    def unpacked(self) -> Callable[..., Any]:
        """The call, in a worker: modules are found there as in the process that starts it."""
        os.chdir(self.folder)
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        call: Callable[..., Any] = cloudpickle.loads(self.call)
        return call


def payload(call: Callable[..., Any]) -> Payload:
    """
    Raises:
        StoreError: the call cannot be pickled, such as for a task that holds an open file.
    """
    try:
        return Payload(cloudpickle.dumps(call), list(sys.path), os.getcwd())  # noqa: PTH109
    except Exception as error:  # whatever the classes of a task raise
        raise StoreError(
            f"the task cannot be sent to worker processes ({type(error).__name__}: {error}): open files and "
            "connections when a row is read, or name the task on the command line, so that each worker loads it itself"
        ) from error
