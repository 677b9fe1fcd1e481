"""Watching how far all workers are, in one progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradtrace.errors import CorruptIndexError
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.work.board import Board, StepState, unfinished_generations

_LOOK_SECONDS = 1.0


def unfinished_steps(directory: Path) -> list[StepState]:
    """The steps that a coordinator waits for in an index directory, and how far each is; none where none are known."""
    for generation in unfinished_generations(directory):
        with suppress(CorruptIndexError):  # of a file that is removed meanwhile
            if states := Board(directory, generation).states():
                return states
    return []


def unfinished_lines(directory: Path) -> Iterator[str]:
    """Line by line, the steps that are left, who does which, and how many are done."""
    states = unfinished_steps(directory)
    if not states:
        yield "no shared build or update is unfinished here"
        return
    for state in states:
        if not state.is_done:
            yield f"{state.step.name}: {_progress(state)}"
    yield f"{sum(state.is_done for state in states)} of {len(states)} steps are done"


def _progress(state: StepState) -> str:
    if state.holder is None:
        return "waiting"
    share = f", {state.holder.units:,} of {state.step.units:,} rows" if state.step.units else ""
    return f"{state.holder.worker}{share}"


class Watch:
    """
    steps_done: how many steps are done that a coordinator waits for or has waited for
    """

    def __init__(self, directory: Path, shown: bool) -> None:
        self._directory, self._shown = directory, shown
        self._bar: tqdm[Any] | None = None
        self._looked = -math.inf
        self._names: set[str] = set()
        self._done: set[str] = set()

    @property
    def steps_done(self) -> int:
        return len(self._done)

    def look(self) -> None:
        """Bring the bar up to date, once a second at most."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        states = unfinished_steps(self._directory)
        if not states:
            return
        self._done |= {state.step.name for state in states if state.is_done}
        names = {state.step.name for state in states}
        if names != self._names:
            self.close()
            self._names = names
            self._bar = progress_bar("workers", sum(state.step.units for state in states), " rows", self._shown)
        assert self._bar is not None
        working = sorted({state.step.title for state in states if state.holder is not None and not state.is_done})
        self._bar.set_description_str(", ".join(working) or "workers", refresh=False)
        self._bar.update(max(0, sum(state.units_done for state in states) - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
