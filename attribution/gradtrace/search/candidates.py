"""Search with an approximate index, which proposes candidates for both ends; exact scores then rank the candidates.

The approximate index holds each row's coordinates at all checkpoints side by side, [rows, C * D], and finds rows of
large inner product with a vector. The query finds the top of a ranking, its negative the bottom. Checkpoints that are
not asked for are zeros in the query, and checkpoint weights are factors of it, so one index serves every choice.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import Floats, Rows, SearchResult, check_search, exhaustive_scores, rank
from gradtrace.store.rows import RowStore

_REBUILD = "restore it or rebuild it with `gradtrace build --searcher`"
_EXTRA_HITS = 4  # beyond k, for which candidates are looked up at each end
_ATTEMPTS, _GROWTH = 3, 4  # each attempt looks up 4 times as many candidates; after the last, search is exact


def unfiltered_count(count: int, allowed: NDArray[np.bool_]) -> int:
    """How many rows to look up in an index that cannot filter, so that about `count` of them are allowed."""
    return min(len(allowed), math.ceil(count * len(allowed) / np.count_nonzero(allowed)))


def import_library(searcher: str, name: str, install: str) -> Any:
    """The module of a searcher's library. Raises StoreError if it is not installed; `install` is the remedy."""
    try:
        return import_module(name)
    except ImportError as error:
        raise StoreError(
            f"{searcher} searcher needs the {name} library ({error}): {install}; "
            'searcher="progressive" needs no library'
        ) from None


class CandidateSearcher(ABC):
    """The k best and k worst of the candidates that an approximate index proposes.

    Scores are exact, but rows may be missed: `SearchResult.exact` is False. Exact search answers instead if rows are
    scaled (the rows of largest cosine need not be among those of largest inner product), if a filter leaves few rows,
    or if the index proposes too few candidates.
    """

    _smallest_share = 1 / 32  # of the rows that a filter must leave: with fewer, exact search is faster
    _candidates_per_hit = 4  # 2 suffice if the index ranks by whole values instead of codes of a few bits

    def __init__(self, store: RowStore, path: Path, device: str | torch.device = "cpu") -> None:
        """path: of the searcher's file, which its library maps. Raises CorruptIndexError if it is missing."""
        self._store, self._device, self._path = store, device, path
        try:
            with path.open("rb") as file:  # never read here, but it knows the file's size, whatever its name is later
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise CorruptIndexError(f"{path} cannot be opened: {error}; {_REBUILD}") from error

    def _check_size(self) -> None:
        """Raises CorruptIndexError if the file was truncated since: to read what was mapped would end the process."""
        if self._map.size() != len(self._map):
            raise CorruptIndexError(f"{self._path} was truncated or replaced while it was open; {_REBUILD}")

    @abstractmethod
    def _nearest(self, vectors: Floats, count: int, allowed: NDArray[np.bool_] | None) -> list[Rows]:
        """About `count` rows of large inner product for each of the vectors [n, C * D]. May ignore `allowed`."""

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
        """See `RowSearcher.search`. Query by query, so that answers do not depend on the batch."""
        check_search(queries, k)
        self._check_size()
        if row_scale is not None:
            return self._exact.search(queries, checkpoints, k, row_scale=row_scale, allowed=allowed)
        with threads(1):
            return [self._search(query, list(checkpoints), k, allowed) for query in queries.cpu()]

    def scores(self, queries: Tensor, checkpoints: Sequence[int], *, row_scale: Tensor | None = None) -> Floats:
        """See `RowSearcher.scores`: all rows are read, whatever is proposed."""
        return exhaustive_scores(self._store, queries, checkpoints, row_scale)

    def _search(self, query: Tensor, checkpoints: list[int], k: int, allowed: NDArray[np.bool_] | None) -> SearchResult:
        exact, norm = query.double().numpy(), float(query.double().norm())
        rows = np.arange(self._store.rows) if allowed is None else np.flatnonzero(allowed)
        count = self._candidates_per_hit * (k + _EXTRA_HITS)
        if norm == 0 or len(rows) <= 2 * count:
            scored = rows if norm else rows[:k]  # if all scores are zero, the lowest rows win
            return SearchResult(*rank(self._store, exact, checkpoints, scored, k), True, len(scored), len(rows))
        candidates = None
        if len(rows) >= self._smallest_share * self._store.rows:
            vector = torch.zeros(self._store.checkpoints, self._store.dimensions)
            vector[checkpoints] = (query.double() / norm).float()
            candidates = self._candidates(vector.flatten().numpy(), count, k, allowed)
        if candidates is None:
            return self._exact.search(query[None], checkpoints, k, allowed=allowed)[0]
        return SearchResult(*rank(self._store, exact, checkpoints, candidates, k), False, len(candidates), len(rows))

    def _candidates(self, vector: Floats, count: int, k: int, allowed: NDArray[np.bool_] | None) -> Rows | None:
        """Rows that may be at either end, ascending; None if the index proposes fewer than k for one of the ends."""
        for _ in range(_ATTEMPTS):
            ends = self._nearest(np.stack([vector, -vector]), min(count, self._store.rows), allowed)
            if allowed is not None:
                ends = [rows[allowed[rows]] for rows in ends]
            if min(map(len, ends)) >= k:
                return np.unique(np.concatenate(ends))
            count *= _GROWTH
        return None
