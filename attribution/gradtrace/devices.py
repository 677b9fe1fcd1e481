"""Devices and threads to compute on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def pick_device(device: str = "auto") -> str:
    """The name of the device; for "auto", the first CUDA device if there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While open, PyTorch uses `count` threads for operations of the calling thread.

    One thread is best for small operations: where another process keeps a core busy, several wait milliseconds for each
    other to share the work on a few thousand values.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_in_threads(call: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
    """`call` of each item, in their order; on the CPU in parallel, on the threads that PyTorch may use.

    An operation on a single example is too small to be shared by threads, which would mostly wait for each other.
    Instead, the threads are divided among the items. A GPU runs asynchronously: the items are called one by one.
    """
    count = min(torch.get_num_threads(), len(items))
    if count < 2 or device.type != "cpu":
        return [call(item) for item in items]
    with threads(torch.get_num_threads() // count), ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, items))
