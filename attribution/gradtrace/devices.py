"""Where to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def pick_device(device: str = "auto") -> str:
    """The device of this name; "auto" is the first CUDA device where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While open, PyTorch computes with so many threads for the thread that calls.

    Sharing the work on a few thousand values costs milliseconds of waiting wherever another process keeps a core busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(call: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
    """`call` of each item, in their order, on the threads of the CPU that PyTorch may use. A GPU is given its work one
    after the other, without waiting for it.

    A model that is run on a single example has nothing to share out within an operation: its threads do little but wait
    for each other. So each item gets a thread of its own, or several where there are more threads than items.
    """
    count = min(torch.get_num_threads(), len(items))
    if count < 2 or device.type != "cpu":
        return [call(item) for item in items]
    with threads(torch.get_num_threads() // count), ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, items))
