"""Processes that compute for this one: how they start and end, and how their errors come back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from typing import Any


def context_preloading(module: str) -> Any:
    """Of `multiprocessing`. Processes are forked from one that has imported this module, such as one that imports
    PyTorch, and has started nothing, so they begin at once; where there is no such way, each is started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def end_with_parent(end: Callable[[], object] = lambda: os._exit(1)) -> None:
    """End this process of `multiprocessing` once its parent has ended, however that did, also from the midst of its
    work. In a process that is none, nothing happens."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            end()

    threading.Thread(target=wait, name="gradtrace-parent", daemon=True).start()


def portable(error: BaseException) -> Exception:
    """The error as another process can receive it. Some cannot be pickled or unpickled, or would end it: these become
    RuntimeErrors with their traceback."""
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        copied = None
    return copied if isinstance(copied, Exception) else RuntimeError("".join(traceback.format_exception(error)))
