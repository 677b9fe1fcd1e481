"""What owns indexes and computes: here, a thread of this process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from gradtrace_service.engine.work import Indexes, Opening, Outcome, Work, answer

Timed = list[tuple[Work[Any], float]]  # works, each with its time of arrival


class WorkerEndedError(Exception):
    """The worker's process ended. taken: whether it had taken the batch, which may have been the reason"""

    def __init__(self, taken: bool) -> None:
        super().__init__(taken)
        self.taken = taken


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker answers to a batch.

    outcomes: one for each work;  memory: resident bytes of its process;  states, openings: as of `Indexes`
    """

    outcomes: list[Outcome]
    memory: int
    states: dict[str, bool | None]
    openings: dict[str, Opening]


class Worker(ABC):
    """Computes one batch at a time. `start` and `answer` block; they run on `thread`.

    Attributes:
        thread: the only one that calls them.
        replaceable: whether it can be ended while it computes.
    """

    replaceable: bool

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "gradtrace-worker")

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes work; else call `start`."""

    @abstractmethod
    def start(self) -> None:
        """Return once it takes work, or is closed."""

    @abstractmethod
    def open_default(self) -> None:
        """Open the first index. Raises IndexUnavailableError, as `Indexes`."""

    @abstractmethod
    def states(self) -> dict[str, bool | None]:
        """As `Indexes.states`, when it was last asked; for any thread."""

    @abstractmethod
    def openings(self) -> dict[str, Opening]:
        """As `Indexes.openings`, when it was last asked; for any thread."""

    @abstractmethod
    def answer(self, works: Timed) -> Report:
        """Raises WorkerEndedError."""

    @abstractmethod
    def end(self) -> None:
        """Let `answer` raise WorkerEndedError; the next `start` replaces the worker. For any thread, if replaceable."""

    def close(self, wait: bool) -> None:
        """For good. wait: for the batch that is computed"""
        self.thread.shutdown(wait, cancel_futures=True)


class ThreadWorker(Worker):
    """Computes on a thread of this process."""

    replaceable = False

    def __init__(self, indexes: Indexes) -> None:
        super().__init__()
        self._indexes = indexes

    @property
    def ready(self) -> bool:
        return True

    def start(self) -> None:
        """It is there."""

    def open_default(self) -> None:
        self._indexes.open_default()

    def states(self) -> dict[str, bool | None]:
        return self._indexes.states()

    def openings(self) -> dict[str, Opening]:
        return self._indexes.openings()

    def answer(self, works: Timed) -> Report:
        return report(self._indexes, works)

    def end(self) -> None:
        """A thread cannot be ended."""

    def close(self, wait: bool) -> None:
        super().close(wait)
        self._indexes.close()


def report(indexes: Indexes, works: Timed) -> Report:
    """Answer the works, on the worker."""
    now = time.perf_counter()  # a clock that all processes share
    waited_ms = [(now - arrived) * 1000.0 for _, arrived in works]
    outcomes = answer(indexes, [work for work, _ in works], waited_ms) if works else []
    return Report(outcomes, psutil.Process().memory_info().rss, indexes.states(), indexes.openings())
