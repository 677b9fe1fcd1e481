"""Search with an approximate index: it proposes candidates for both ends, and the stored rows rank them exactly.

The approximate index holds each row's coordinates at all checkpoints side by side, [rows, C * D], and finds large inner
products. The top of a ranking is looked up with the query, the bottom with its negative. Checkpoints that a query
leaves out are zeros in it, and weights are factors of it, so one index serves them all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.errors import QueryError
from gradtrace.search.progressive import Floats, ProgressiveSearcher, Rows, SearchResult, rank
from gradtrace.store.rows import RowStore

_MORE = 4  # candidates for each end: for so many more hits than are asked for
_ATTEMPTS, _GROWTH = 3, 4  # each with so many times the candidates, before exact search takes over


class Searcher(Protocol):
    """Finds both ends of queries' rankings."""

    def search(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """As `ProgressiveSearcher.search`."""
        ...


def widened(count: int, allowed: NDArray[np.bool_]) -> int:
    """How many rows to look up for some `count` that are allowed, where the index itself knows no filter."""
    return min(len(allowed), math.ceil(count * len(allowed) / np.count_nonzero(allowed)))


class CandidateSearcher(ABC):
    """The k best and k worst of the candidates that an approximate index proposes.

    Scores are exact; rows may be missed, and then `SearchResult.exact` is False. Exact search answers instead where
    rows are scaled (the largest cosines need not be among the largest inner products), where a filter leaves few rows,
    and where too few candidates turn up.
    """

    _least_share = 1 / 32  # of the rows, that a filter must leave; with fewer, exact search does better
    _per_hit = 4  # candidates; 2 do where the index ranks by whole values, not by codes of a few bits

    def __init__(self, store: RowStore, device: str | torch.device = "cpu") -> None:
        self._store, self._device = store, device

    @abstractmethod
    def _nearest(self, vectors: Floats, count: int, allowed: NDArray[np.bool_] | None) -> list[Rows]:
        """For each vector [n, C * D] some `count` rows of large inner products. May pass over `allowed`."""

    @cached_property
    def _exact(self) -> ProgressiveSearcher:
        return ProgressiveSearcher(self._store, self._device)

    def search(
        self,
        queries: Tensor,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Tensor | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """As `ProgressiveSearcher.search`, one query after the other: a batch changes no answer."""
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        if row_scale is not None:
            return self._exact.search(queries, checkpoints, k, row_scale=row_scale, allowed=allowed)
        with threads(1):
            return [self._search(query, list(checkpoints), k, allowed) for query in queries.cpu()]

    def _search(self, query: Tensor, checkpoints: list[int], k: int, allowed: NDArray[np.bool_] | None) -> SearchResult:
        doubles, norm = query.double().numpy(), float(query.double().norm())
        if not math.isfinite(norm):
            raise QueryError("the query's gradient has coordinates that are NaN or infinite")
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        count = self._per_hit * (k + _MORE)
        if norm == 0 or len(rows) <= 2 * count:
            rows, searched = (rows if norm else rows[:k]), len(rows)  # all scores are zero: the lowest ids win
            return rank(self._store, doubles, checkpoints, rows, k, exact=True, touched=len(rows), searched=searched)
        found = None
        if len(rows) >= self._least_share * self._store.rows:
            vector = torch.zeros(self._store.checkpoints, self._store.dimensions)
            vector[checkpoints] = (query.double() / norm).float()
            found = self._candidates(vector.flatten().numpy(), count, k, allowed)
        if found is None:
            return self._exact.search(query[None], checkpoints, k, allowed=allowed)[0]
        return rank(self._store, doubles, checkpoints, found, k, exact=False, touched=len(found), searched=len(rows))

    def _candidates(self, vector: Floats, count: int, k: int, allowed: NDArray[np.bool_] | None) -> Rows | None:
        """Rows that may be at either end, ascending; None where fewer than k turn up at one of them."""
        for _ in range(_ATTEMPTS):
            ends = self._nearest(np.stack([vector, -vector]), min(count, self._store.rows), allowed)
            if allowed is not None:
                ends = [rows[allowed[rows]] for rows in ends]
            if min(map(len, ends)) >= k:
                return np.unique(np.concatenate(ends))
            count *= _GROWTH
        return None
