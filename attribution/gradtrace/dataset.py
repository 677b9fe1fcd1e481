"""Reading a map-style data set by row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
