"""Processes that are forked from one which has imported what they need."""

from __future__ import annotations

import multiprocessing
from typing import Any


def context_preloading(module: str) -> Any:
    """Of `multiprocessing`. Processes are forked from one that has imported this module, such as one that imports
    PyTorch, and has started nothing, so they begin at once; where there is no such way, each is started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
