"""Examples to try an index with."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gradtrace.dataset import fetch
from gradtrace.task import Example, Task

Split = Literal["query", "train"]


def held_out(task: Task, count: int) -> tuple[Split, list[Example]]:
    """Random examples of the query data where the task has some, else of the training data; the same every time."""
    split, rows = held_out_rows(task, count)
    return split, fetch(getattr(task, split), rows)


def held_out_rows(task: Task, count: int | None) -> tuple[Split, list[int]]:
    """Their numbers, in random order; None: all of them."""
    split: Split = "query" if task.query is not None and len(task.query) else "train"
    return split, np.random.default_rng(0).permutation(len(getattr(task, split)))[:count].tolist()
