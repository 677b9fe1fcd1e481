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
    """The examples at these rows, at once where the data set offers PyTorch's `__getitems__`.

    Raises:
        DatasetError: reading a row fails; the text names it.
    """
    try:
        if hasattr(dataset, "__getitems__"):
            return list(dataset.__getitems__(list(rows)))
    except Exception:  # find out below which row it is
        pass
    examples = []
    for row in rows:
        try:
            examples.append(dataset[row])
        except Exception as error:
            raise DatasetError(f"reading row {row} of the data set failed: {type(error).__name__}: {error}") from error
    return examples


def content_hash(example: Example) -> str:
    """SHA-256 of what an example holds: equal for equal content, in any process.

    Raises:
        DatasetError: a part of the example is of a type that has no content to speak of (an open file, say).
    """
    return hashlib.sha256(b"\0".join(_bytes(leaf) for leaf in tree_leaves(example))).hexdigest()


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):  # as bytes, since NumPy knows no bfloat16
        data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + data
    if hasattr(leaf, "tobytes"):  # NumPy's and PIL's; the repr of an image holds its address
        described = [getattr(leaf, name, None) for name in ("dtype", "mode", "shape", "size")]
        return f"{type(leaf).__name__} {described} ".encode() + bytes(leaf.tobytes())
    try:
        return pickle.dumps(leaf, protocol=4)
    except Exception as error:
        raise DatasetError(
            f"the training examples hold a {type(leaf).__name__}, whose content cannot be hashed ({error}); return "
            "tensors, arrays, images, numbers or text"
        ) from error
