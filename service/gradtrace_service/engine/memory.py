"""Running out of memory: what it looks like, and what is done about it."""

from __future__ import annotations

import gc

import torch

# PyTorch's allocator for CPUs, and C++ libraries, raise a RuntimeError that says so in words alone.
_WORDS = ("can't allocate memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, means that memory did not suffice."""
    if error is None:
        return False
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or told or is_out_of_memory(error.__cause__)


def release_memory() -> None:
    """Give back what is kept for later. The error must be gone: its traceback holds the tensors of every frame."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
