"""Indexes whose opening takes long are told in the log; one whose opening hangs is given up.

A task may hang while it is loaded, and so may a file system. Opening a large index takes minutes, in which its files
are verified one by one, so it hangs where nothing was verified for long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from gradtrace_service.engine.work import Opening

SLOW_SECONDS = 60.0
HUNG_SECONDS = 600.0  # also a task that reads all of its data when it is loaded has time for that
_LONGEST_WAIT_SECONDS = 8 * 3600.0

_log = logging.getLogger(__name__)


class SlowOpenings:
    """For the event loop's thread. clock: seconds"""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: set[str] = set()
        self._waits: dict[str, float] = {}  # seconds, of the indexes that were given up
        self._until: dict[str, float] = {}  # as of the clock: they are not opened before

    def look(self, openings: Mapping[str, Opening], states: Mapping[str, bool | None]) -> list[str]:
        """Returns the indexes whose opening hangs, and that do not answer meanwhile from an earlier generation.

        openings, states: of a worker, as of `Indexes`
        """
        self._told &= openings.keys()
        for name, opening in openings.items():
            if opening.seconds > SLOW_SECONDS and name not in self._told:
                self._told.add(name)
                log_slow(name, opening)
        for name in [name for name in self._waits if states.get(name)]:
            del self._waits[name]
            self._until.pop(name, None)
        hung = [name for name, opening in openings.items() if opening.still > HUNG_SECONDS and not states.get(name)]
        return [name for name in hung if not self.refuses(name)]

    def give_up(self, name: str, opening: Opening) -> None:
        """Requests for the index are refused from now on, for twice as long each time."""
        wait = min(2 * self._waits.get(name, HUNG_SECONDS / 2), _LONGEST_WAIT_SECONDS)
        self._waits[name], self._until[name] = wait, self._clock() + wait
        text = "index %s is given up, and tried again in %d s: its opening hangs, for %d s%s"
        _log.error(text, name, wait, opening.still, _at(opening))

    def refuses(self, name: str | None) -> bool:
        """Whether the index was given up, and is not to be tried again yet."""
        return name is not None and self._until.get(name, 0.0) > self._clock()

    def given_up(self) -> list[str]:
        return list(self._waits)


def log_slow(name: str, opening: Opening | None) -> None:
    if opening is not None:
        _log.warning("index %s has been opening for %d s%s", name, opening.seconds, _at(opening))


def _at(opening: Opening) -> str:
    return f" (at {opening.place})" if opening.place else ""
