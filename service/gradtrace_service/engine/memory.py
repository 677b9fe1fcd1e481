"""Recognising that memory ran out, and giving caches back."""

from __future__ import annotations

import gc

import torch

# PyTorch's allocator for CPUs, and C++ libraries, raise a RuntimeError that only its text tells apart.
_PHRASES = ("can't allocate memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, means that memory ran out."""
    if error is None:
        return False
    by_text = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or by_text or is_out_of_memory(error.__cause__)


def release_memory() -> None:
    """Empty caches. Call it after the except block: a live traceback keeps every frame's tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
