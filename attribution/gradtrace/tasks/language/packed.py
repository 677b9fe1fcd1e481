"""Rows that a trainer packed: several documents one after the other, each of which is a row here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gradtrace.errors import DatasetError
from gradtrace.tasks.language.records import Record

_TOKENS, _LENGTHS, _POSITIONS = "input_ids", "seq_lengths", "position_ids"  # as TRL and transformers name them


def unpacked(records: Sequence[Record]) -> Sequence[Record]:
    """The documents of packed rows, in order; the rows themselves, if the first is not packed.

    A packed row has the lengths of its documents beside its tokens (`seq_lengths`), or positions that begin anew with
    each document (`position_ids`).
    """
    first = records[0]
    return Documents(records) if _TOKENS in first and (_LENGTHS in first or _POSITIONS in first) else records


class Documents(Sequence[Record]):
    """The documents of packed rows. All rows are read once, for the number of documents in each."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Raises DatasetError for a row whose documents have other tokens than it has, in sum."""
        self.packed = records
        columns = [name for name in (_TOKENS, _LENGTHS, _POSITIONS) if name in records[0]]
        narrow = records.select_columns(columns) if hasattr(records, "select_columns") else records
        counts = [len(_edges(narrow[row])) - 1 for row in range(len(narrow))]
        self._starts = np.cumsum([0, *counts])  # [rows + 1], the number of each row's first document

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, document: Any) -> Any:
        row = int(np.searchsorted(self._starts, document, side="right")) - 1
        record = self.packed[row]
        start, stop = list(pairwise(_edges(record)))[document - int(self._starts[row])]
        tokens = len(record[_TOKENS])
        by_token = {name: value for name, value in record.items() if _is_by_token(value, tokens)}
        return {name: value[start:stop] for name, value in by_token.items() if name not in (_LENGTHS, _POSITIONS)}


def _is_by_token(value: Any, tokens: int) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and len(value) == tokens


def _edges(record: Record) -> list[int]:
    """The first token of each document, and the number of tokens."""
    tokens = len(record[_TOKENS])
    if record.get(_LENGTHS) is not None:
        edges: list[int] = np.cumsum([0, *record[_LENGTHS]]).tolist()
        if edges[-1] != tokens:
            raise DatasetError(f"a packed row has {tokens} input_ids, and its seq_lengths are {edges[-1]} in sum")
        return edges
    starts = np.flatnonzero(np.asarray(record[_POSITIONS]) == 0).tolist() if record.get(_POSITIONS) is not None else []
    return [*(starts or [0]), tokens]
