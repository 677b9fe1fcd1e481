"""The words of rendered rows, for search."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace import Task
from gradtrace.tasks.hooks import rendered
from gradtrace_service.answers.slices import Sliced
from gradtrace_service.engine.work import is_out_of_memory

_KEPT_BYTES = 64 << 20
_LOOKED_AT = 3


class RowTexts(Sliced):
    """The texts of a data set's renderings, without their case. Pictures have none.

    present: bool [rows]; others are not read
    kept: bytes; rows beyond are not searched

    Attributes:
        full: whether rows are left out for want of room;  searched: the rows before these.
    """

    def __init__(self, task: Task, dataset: Any, present: NDArray[np.bool_], kept: int = _KEPT_BYTES) -> None:
        super().__init__(len(present))
        self._task, self._dataset, self._present, self._room = task, dataset, present, kept
        self._texts: list[str] = []
        self.full, self.searched = False, 0

    def has_words(self) -> bool:
        """Whether any of the first rows has."""
        return any(self._text(row) for row in np.flatnonzero(self._present)[:_LOOKED_AT].tolist())

    def compute(self, rows: range) -> None:
        for row in rows:
            text = self._text(row) if self._present[row] and not self.full else ""
            self._room -= sys.getsizeof(text) if text else 0
            self.full = self.full or self._room < 0
            self._texts.append("" if self.full else text)
            self.searched += not self.full

    def holding(self, words: Sequence[str]) -> NDArray[np.bool_]:
        """The rows whose text contains every word. bool [rows]; False for those that are not done."""
        folded = [word.casefold() for word in words]
        mask = np.zeros(self.rows, dtype=np.bool_)
        mask[: len(self._texts)] = [all(word in text for word in folded) for text in self._texts]
        return mask

    def _text(self, row: int) -> str:
        try:
            return "\n".join(_texts(rendered(self._task, self._dataset[row]))).casefold()
        except Exception as error:  # whatever the user's code raises
            if is_out_of_memory(error):
                raise
            return ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if not value.startswith("data:"):
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
