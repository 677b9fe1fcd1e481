"""Exact search over shards: both ends of each are merged into those of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.search.scored_rows import Floats, ScoredRows, SearchResult
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.server import Question, ShardServer

Queries = TypeVar("Queries", contravariant=True)
Scale = TypeVar("Scale", Tensor, Floats, contravariant=True)


class ShardedSearcher(Generic[Queries, Scale]):
    """A `RowSearcher` whose rows are in shards. Each sends the exact scores, in float64, of the rows at its own ends:
    those at the ends of all rows are among them, and are ordered as if one searcher had found them."""

    def __init__(self, shards: RowShards) -> None:
        self._shards = shards

    def search(
        self,
        queries: Queries,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Scale | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """See `RowSearcher.search`. `rows_touched` is the sum over the shards, each of which finds its own ends."""
        windows = self._shards.windows
        searched = [n for n, w in enumerate(windows) if allowed is None or allowed[w.start : w.stop].any()]
        ask = partial(ShardServer.search, queries=_portable(queries), checkpoints=checkpoints, k=k)

        def question(window: range) -> Question[list[ScoredRows]]:
            admitted = None if allowed is None else allowed[window.start : window.stop]
            return partial(ask, row_scale=_of_window(row_scale, window), allowed=admitted)

        # Also where no row is allowed, one of them finds the query's faults.
        by_shard = self._shards.ask({number: question(windows[number]) for number in searched or [0]})
        return [ScoredRows.merged(of_query).result(k) for of_query in zip(*by_shard, strict=True)]

    def scores(self, queries: Queries, checkpoints: Sequence[int], *, row_scale: Scale | None = None) -> Floats:
        """See `RowSearcher.scores`."""
        ask = partial(ShardServer.scores, queries=_portable(queries), checkpoints=checkpoints)
        by_shard = self._shards.ask_all(lambda window: partial(ask, row_scale=_of_window(row_scale, window)))
        return np.concatenate(by_shard, axis=1)


def _portable(values: Any) -> Any:
    """A tensor on the CPU, with no more values than it has: a view is pickled with all that it is a view of."""
    return values.detach().cpu().clone() if isinstance(values, Tensor) else values


def _of_window(row_scale: Any, window: range) -> Any:
    return None if row_scale is None else _portable(row_scale[window.start : window.stop])
