"""Clients that keep a connection and do nothing with it are cut off; uvicorn waits for them for ever.

`cut_off_slow_clients` looks after what lies outside of a request, its body is BodyLimit's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any

PATIENCE_SECONDS = 20.0
_BYTES_A_SECOND = 16 << 10
_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


def seconds_for(count: int) -> float:
    """The time to send so many bytes of a body and those that come next."""
    return PATIENCE_SECONDS + count / _BYTES_A_SECOND


async def cut_off_slow_clients(connections: Collection[Any]) -> None:
    """For as long as it runs, end those connections whose client sends no whole head of a request within
    PATIENCE_SECONDS, or reads nothing of its answer for as long.

    connections: uvicorn's protocols, of h11 or httptools; what is read of them are `transport`, `cycle`, the request
        that came last and its answer, and whether uvicorn itself will close it for being idle
    """
    stalled: dict[Any, tuple[Any, float]] = {}  # what the client is waited for to do, and since when
    while True:
        now, before, stalled = time.monotonic(), stalled, {}
        for connection in connections:
            awaited = _awaited(connection)
            if awaited is not None:
                same = connection in before and before[connection][0] == awaited
                stalled[connection] = before[connection] if same else (awaited, now)
        for connection, (_, since) in stalled.items():
            if now - since > PATIENCE_SECONDS:
                _log.info("cut off a client that was too slow: %s", connection.client)
                connection.transport.abort()
        await asyncio.sleep(_LOOK_SECONDS)


def _awaited(connection: Any) -> Any:
    """Changes whenever the client does what it is waited for to do; None where it is the service's turn."""
    cycle, unread = connection.cycle, connection.transport.get_write_buffer_size()
    if unread:
        return cycle, unread
    within_head = cycle is None or (cycle.response_complete and connection.timeout_keep_alive_task is None)
    return (cycle, unread) if within_head else None
