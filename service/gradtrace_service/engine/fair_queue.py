"""Requests that wait, and whose turn it is: each index has a fair share of the workers' time, and in it each client.

Start-time fair queueing (Goyal, Vin, Cheng 1996): each index has a virtual time, which grows by the seconds that it was
computed for, and the index with the least is next. The clients of an index share its time in the same way. One that
was idle begins at the virtual time of those in service, so it cannot save up time, and nobody waits for it to be used.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gradtrace_service.engine.work import Work

_KEPT = 1024  # virtual times that are remembered, before those are dropped that say nothing

# A client whose answer was just sent needs some milliseconds to ask again. If its index is behind, a long pass for
# another index waits for it so long, at most this share of the pass: else two clients would be held up at each answer.
_RETURN_SECONDS = 0.040
_SHARE_OF_PASS = 0.15


@dataclass(eq=False, slots=True)
class Waiting:
    """A request in the queue, or at a worker.

    answer: done when it is answered, or given up
    expires: seconds of `time.perf_counter`, after which nobody waits for the answer
    alone: it was in a batch that had to be given up, and is tried again by itself
    patience: seconds that it may be computed for by itself, which leaves time for others; None: until `expires`
    losses: worker processes that ended while they computed it
    """

    work: Work[Any]
    answer: asyncio.Future[Any]
    expires: float
    request_id: str | None = None
    arrived: float = field(default_factory=time.perf_counter)  # a clock that all processes share
    alone: bool = False
    patience: float | None = None
    losses: int = 0


_Flow = OrderedDict[Waiting, None]  # in which any request can be found, and removed, at once


class _Shares:
    """Virtual times, in seconds."""

    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}
        self._now = 0.0

    def join(self, key: Hashable) -> None:
        """From now on something waits for `key`, and before nothing did."""
        self._times[key] = self.time(key)
        if len(self._times) > _KEPT:
            self._times = {key: time for key, time in self._times.items() if time > self._now}

    def time(self, key: Hashable) -> float:
        return max(self._times.get(key, 0.0), self._now)

    def ordered(self, keys: Iterable[Hashable]) -> list[Any]:
        return sorted(keys, key=self.time)

    def chosen(self, key: Hashable) -> None:
        self._now = self.time(key)

    def charge(self, key: Hashable, seconds: float) -> None:
        self._times[key] = self.time(key) + seconds


@dataclass(slots=True)
class _IndexQueue:
    """flows: of each client, in order of arrival; none is empty.  pass_seconds: of the last pass, 0 before any"""

    flows: dict[str, _Flow] = field(default_factory=dict)
    clients: _Shares = field(default_factory=_Shares)
    pass_seconds: float = 0.0
    answered: float = -_RETURN_SECONDS  # when the last pass ended

    def waiting(self) -> Iterator[Waiting]:
        return (waiting for flow in self.flows.values() for waiting in flow)

    def remove(self, waiting: Waiting) -> None:
        flow = self.flows[waiting.work.client]
        del flow[waiting]
        if not flow:
            del self.flows[waiting.work.client]

    def drop_done(self) -> None:
        """Forget requests whose caller went away, or whose deadline passed."""
        for waiting in [waiting for waiting in self.waiting() if waiting.answer.done()]:
            self.remove(waiting)


class FairQueue:
    """For the event loop's thread. clock: seconds"""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._indexes: dict[str | None, _IndexQueue] = {}
        self._shares = _Shares()
        self._clock = clock

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Waiting]:
        """Those whose caller still waits."""
        for queue in self._indexes.values():
            yield from (waiting for waiting in queue.waiting() if not waiting.answer.done())

    def add(self, waiting: Waiting, first: bool = False) -> None:
        """first: before the others of its client, because it waited before"""
        index, client = waiting.work.index, waiting.work.client
        if len(self._indexes) > _KEPT:  # names that do not exist, made up by callers
            self._indexes = {name: queue for name, queue in self._indexes.items() if queue.flows}
        queue = self._indexes.setdefault(index, _IndexQueue())
        if not queue.flows:
            self._shares.join(index)
        if client not in queue.flows:
            queue.clients.join(client)
        flow = queue.flows.setdefault(client, OrderedDict())
        flow[waiting] = None
        if first:
            flow.move_to_end(waiting, last=False)

    def discard(self, waiting: Waiting) -> None:
        """Forget a request, if it is still here. Its caller went away, and no worker may be free for long."""
        queue = self._indexes.get(waiting.work.index)
        if queue is not None and waiting in queue.flows.get(waiting.work.client, ()):
            queue.remove(waiting)

    def newest_of_most(self, client: str) -> Waiting | None:
        """The newest request of the client who has the most waiting; None where `client` would then have as many."""
        waiting = [one for one in self if not one.work.internal]
        counts = Counter(one.work.client for one in waiting)
        most = max(counts, key=counts.__getitem__, default=client)
        if counts[most] <= counts[client] + 1:
            return None
        return max((one for one in waiting if one.work.client == most), key=lambda one: one.arrived)

    def has_turn(self, paused: Collection[str | None] = ()) -> bool:
        """Whether `take` would give something."""
        return self._next(paused) is not _NOBODY

    def take(self, size: Callable[[Work[Any]], int], paused: Collection[str | None] = ()) -> list[Waiting]:
        """Remove the request whose turn it is, and those that can be answered with it.

        size: for the former, the queries of all of them at most
        paused: indexes that are passed over
        """
        index = self._next(paused)
        if index is _NOBODY:
            return []
        queue = self._indexes[index]
        self._shares.chosen(index)
        clients = queue.clients.ordered(queue.flows)
        queue.clients.chosen(clients[0])
        batch = _batch([queue.flows[client] for client in clients], size)
        for waiting in batch:
            queue.remove(waiting)
        return batch

    def expected(self, paused: Collection[str | None] = ()) -> float:
        """Seconds for which the next pass should wait, because an index that is behind is likely to be asked again."""
        index = self._next(paused)
        if index is _NOBODY:
            return 0.0
        patience = min(_RETURN_SECONDS, _SHARE_OF_PASS * self._indexes[index].pass_seconds)
        behind = [
            queue.answered
            for other, queue in self._indexes.items()
            if not queue.flows and self._shares.time(other) < self._shares.time(index)
        ]
        return max([answered + patience - self._clock() for answered in behind], default=0.0)

    def charge(self, batch: Collection[Waiting], seconds: float) -> None:
        """A pass has ended: its time counts for its clients, by their numbers of queries."""
        index = next(iter(batch)).work.index
        queue, queries = self._indexes.setdefault(index, _IndexQueue()), sum(waiting.work.size for waiting in batch)
        queue.pass_seconds, queue.answered = seconds, self._clock()
        self._shares.charge(index, seconds)
        for waiting in batch:
            queue.clients.charge(waiting.work.client, seconds * waiting.work.size / queries)

    def _next(self, paused: Collection[str | None]) -> Any:
        for queue in self._indexes.values():
            queue.drop_done()
        waiting = [index for index, queue in self._indexes.items() if queue.flows and index not in paused]
        return self._shares.ordered(waiting)[0] if waiting else _NOBODY


_NOBODY = object()


def _batch(flows: list[_Flow], size: Callable[[Work[Any]], int]) -> list[Waiting]:
    """The first of the first flow, and in turn from each flow others of its kind while they fit."""
    first = next(iter(flows[0]))
    if first.alone or first.work.kind is None:
        return [first]
    batch, room = [first], size(first.work) - first.work.size
    of_kind = [
        deque(one for one in flow if one is not first and not one.alone and one.work.kind == first.work.kind)
        for flow in flows
    ]
    of_kind.append(of_kind.pop(0))  # the first flow has had its turn
    while room > 0 and any(of_kind):
        for flow in of_kind:
            if flow and (waiting := flow.popleft()).work.size <= room:
                batch.append(waiting)
                room -= waiting.work.size
    return batch
