"""Held-out examples, to measure an index with."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradtrace.data.dataset import fetch
from gradtrace.task import Example, Task

Split = Literal["query", "train"]


def held_out(task: Task, count: int, present: NDArray[np.bool_]) -> tuple[Split, list[Example]]:
    """Random examples of the task's query data, or where it has none of the training rows that are `present` in an
    index; the same every time.  present: bool [training rows]"""
    split, rows = held_out_rows(task, count, present)
    return split, fetch(getattr(task, split), rows)


def held_out_rows(task: Task, count: int | None, present: NDArray[np.bool_]) -> tuple[Split, list[int]]:
    """Their numbers, in random order; None: all of them."""
    split: Split = "query" if task.query is not None and len(task.query) else "train"
    rows = np.random.default_rng(0).permutation(len(getattr(task, split)))
    return split, (rows if split == "query" else rows[present[rows]])[:count].tolist()
