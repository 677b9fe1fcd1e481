"""Works that nobody waits for, done in slices while the workers have nothing else to do."""

from __future__ import annotations

import asyncio
import logging
import time

from gradtrace_service.engine.engine import DrainingError, Engine
from gradtrace_service.engine.work import Work

_FIRST_SECONDS = 0.3  # before the first slice: a browser on the same machine draws what was just answered
_LOOK_SECONDS = 0.02  # between two looks whether the workers are free
_LONGEST_WAIT_SECONDS = 1.0  # for workers that are never free: then a slice is done all the same

_log = logging.getLogger(__name__)


class Background:
    """For the event loop's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str | None, asyncio.Task[None]] = {}

    def go_on(self, work: Work[bool]) -> None:
        """Repeat the work on every worker, until it returns True on all: it then has nothing left to do. Does nothing
        while works of the same index are repeated."""
        if work.index not in self._running:
            running = self._running[work.index] = asyncio.ensure_future(self._repeat(work))
            running.add_done_callback(lambda _: self._running.pop(work.index))

    async def _repeat(self, work: Work[bool]) -> None:
        await asyncio.sleep(_FIRST_SECONDS)
        done = False
        while not done:
            await self._free_workers()
            slices = [self._engine.run(work) for _ in self._engine.workers]
            outcomes = await asyncio.gather(*slices, return_exceptions=True)
            failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            if failures:  # whoever needs it starts it again
                if not isinstance(failures[0], DrainingError):
                    _log.warning("work in the background failed: %r", failures[0].__cause__ or failures[0])
                return
            done = all(outcomes)

    async def _free_workers(self) -> None:
        until = time.monotonic() + _LONGEST_WAIT_SECONDS
        while (self._engine.waiting or self._engine.computing) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        for running in self._running.values():
            running.cancel()
