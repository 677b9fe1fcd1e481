"""How many requests a client may send."""

from __future__ import annotations

import time
from collections.abc import Callable

_MINUTE = 60.0


class RateLimit:
    """A token bucket for each client: it holds the requests of one minute, and fills evenly.

    Kept as the one moment at which the bucket is full again (the generic cell rate algorithm, ITU-T I.371).
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = _MINUTE / per_minute
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._swept = clock()

    def take(self, client: str) -> float:
        """Seconds until the client may send this request; 0: now, and it is counted."""
        now = self._clock()
        self._sweep(now)
        full_at = max(self._full_at.get(client, now), now) + self._interval
        wait = full_at - now - _MINUTE
        if wait > 1e-6:  # below: rounding
            return wait
        self._full_at[client] = full_at
        return 0.0

    def _sweep(self, now: float) -> None:
        """Forget, once a minute, whose bucket is full: clients come and go for months."""
        if now - self._swept >= _MINUTE:
            self._swept = now
            self._full_at = {client: full_at for client, full_at in self._full_at.items() if full_at > now}
