"""For how long a batch is computed before its worker is given up, and how its requests are tried again.

Half of the deadline is a batch's: a pass takes a second, so one that takes so long holds a request that hangs. Its
requests are then tried again one by one, each for a part of the time that is left; one that needs longer is tried once
more after the others, until its deadline. Only the one that hangs is told that it took too long. The next batches of
its kind are smaller, in case they are just slow. A request by itself has its whole deadline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gradtrace_service.engine.fair_queue import Waiting
from gradtrace_service.engine.work import Work

_LONGEST_GRACE_SECONDS = 1.0  # beyond the deadline, in which a request that is just late spares the worker
_SHORTEST_BATCH_SECONDS = 2.0
_SHORTEST_SHARE_SECONDS = 1.0
_BATCH_SHARE = 0.5  # of the deadline
_TIMES_AS_LONG = 3.0  # as its share of the pass that was given up, a request by itself may take
_LARGEST_SHARE = 1 / 3  # of the time left, so that others have theirs
_KEPT = 1024  # kinds of which batches are smaller


def half(deadline: float) -> float:
    """Seconds that a worker has for a batch, or to say that it is there: its requests are then tried in the rest."""
    return max(deadline * _BATCH_SHARE, _SHORTEST_BATCH_SECONDS)


def longest_pass(batch: Sequence[Waiting], replaceable: bool, deadline: float) -> float:
    """Seconds after which a worker that computes this batch is given up.

    replaceable: whether a new one takes its place;  deadline: seconds that a request may take
    """
    grace = min(deadline / 10, _LONGEST_GRACE_SECONDS)
    if not replaceable:
        return deadline + _LONGEST_GRACE_SECONDS
    if len(batch) > 1:
        return half(deadline)
    left = max(batch[0].expires - time.perf_counter(), 0.0) + grace
    return left if batch[0].patience is None else min(left, batch[0].patience)


def leave_alone(batch: Sequence[Waiting], late: bool, took: float) -> None:
    """Mark requests whose worker was lost after `took` seconds, so that they are tried again one by one."""
    queries = sum(waiting.work.size for waiting in batch)
    left = min(waiting.expires for waiting in batch) - time.perf_counter()
    for waiting in batch:
        waiting.alone = True
        waiting.losses += not late
        if late:
            slow = _TIMES_AS_LONG * took * waiting.work.size / queries
            waiting.patience = max(left / len(batch), min(slow, left * _LARGEST_SHARE), _SHORTEST_SHARE_SECONDS)


class BatchSizes:
    """How many queries are given to a worker at once: half as many of a kind that took too long, until it is fast."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._smaller: dict[int, int] = {}  # by the hash of index and kind, since a kind may be a long text

    def of(self, work: Work[Any]) -> int:
        return self._smaller.get(hash((work.index, work.kind)), self._largest)

    def note(self, batch: Sequence[Waiting], seconds: float, longest: float) -> None:
        """A pass took so many seconds of the `longest` that it may take, or was given up then."""
        work, queries = batch[0].work, sum(waiting.work.size for waiting in batch)
        size, key = self.of(work), hash((work.index, work.kind))
        if len(batch) > 1 and seconds >= longest:
            self._smaller.pop(key, None)
            self._smaller[key] = max(min(size, queries) // 2, 1)
        elif size < self._largest and 2 * queries > size and seconds < longest / 4:  # twice as many fit as well
            self._smaller[key] = 2 * size
            if 2 * size >= self._largest:
                del self._smaller[key]
        if len(self._smaller) > _KEPT:
            del self._smaller[next(iter(self._smaller))]  # the one that was late the longest ago
