"""The shards of an open index: which rows each has, and asking all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from gradtrace.search.scored_rows import Rows
from gradtrace.sharded.server import Question
from gradtrace.sharded.transport import ShardTransport

T = TypeVar("T")


class RowShards:
    """windows: the rows of each shard, ascending, which tile those of the index"""

    def __init__(self, windows: Sequence[range], transport: ShardTransport) -> None:
        self.windows, self._transport = windows, transport

    def ask(self, questions: Mapping[int, Question[T]]) -> list[T]:
        """See `ShardTransport.ask`."""
        return self._transport.ask(questions)

    def ask_all(self, question: Callable[[range], Question[T]]) -> list[T]:
        """Ask each shard the question of its window; their answers in the order of the rows."""
        return self.ask({number: question(window) for number, window in enumerate(self.windows)})

    def ask_for_rows(self, rows: Rows, question: Callable[[Rows], Question[T]]) -> list[tuple[Rows, T]]:
        """Ask the shards that have some of the rows [m], which may come in any order.

        question: of a shard, for its rows as it counts them

        The places of each shard's rows in `rows`, and its answer; in the order of the shards.
        """
        places: dict[int, Rows] = {}
        for number, window in enumerate(self.windows):
            here = np.flatnonzero((rows >= window.start) & (rows < window.stop))
            if len(here):
                places[number] = here
        asked = {number: question(rows[here] - self.windows[number].start) for number, here in places.items()}
        return list(zip(places.values(), self.ask(asked), strict=True))

    def close(self) -> None:
        self._transport.close()
