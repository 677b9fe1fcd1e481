"""Reading a map-style data set by row numbers."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradtrace.errors import DatasetError
from gradtrace.task import Example


def fetch(dataset: Any, rows: Sequence[int]) -> list[Example]:
    """The examples at these rows, read at once if the data set has PyTorch's `__getitems__`.

    Raises:
        DatasetError: a row cannot be read; the text names it.
    """
    try:
        if hasattr(dataset, "__getitems__"):
            return list(dataset.__getitems__(list(rows)))
    except Exception:  # the loop below tells which row fails
        pass
    examples = []
    for row in rows:
        try:
            examples.append(dataset[row])
        except Exception as error:
            raise DatasetError(f"reading row {row} of the data set failed: {type(error).__name__}: {error}") from error
    return examples


def content_hash(example: Example) -> str:
    """Hexadecimal SHA-256 of an example's content, the same in every process.

    Raises:
        DatasetError: the example holds an object that cannot be hashed by content (such as an open file).
    """
    return hashlib.sha256(b"\0".join(_bytes(leaf) for leaf in tree_leaves(example))).hexdigest()


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):  # viewed as bytes, since NumPy has no bfloat16
        data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + data
    if hasattr(leaf, "tobytes"):  # arrays, and images of PIL, whose repr contains their address
        described = [getattr(leaf, name, None) for name in ("dtype", "mode", "shape", "size")]
        return f"{type(leaf).__name__} {described} ".encode() + bytes(leaf.tobytes())
    try:
        return pickle.dumps(leaf, protocol=4)
    except Exception as error:
        raise DatasetError(
            f"the training examples hold a {type(leaf).__name__}, whose content cannot be hashed ({error}); return "
            "tensors, arrays, images, numbers or text"
        ) from error
