"""What a request asks of a worker. Works are pickled where workers are processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from gradtrace import Index
from gradtrace.errors import QueryError, StoreError, TaskError
from gradtrace_service.engine.memory import is_out_of_memory, release_memory

T = TypeVar("T")

Outcome = Any  # a work's result, or the exception that it raised


class IndexUnavailableError(StoreError):
    """An index of the service cannot be opened as it is on disk now."""


class OutOfMemoryError(Exception):
    """There was not the memory to answer this request, be it alone."""


# Whose cause is for the caller to know.
REFUSALS = (QueryError, TaskError, IndexUnavailableError, OutOfMemoryError)


class Indexes(Protocol):
    """Open indexes by name."""

    def get(self, name: str | None) -> Index:
        """Raises FieldError for a name that is not there, IndexUnavailableError for an index that cannot be opened."""


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """A request for one index.

    index: its name; None: the only or first one
    call: its answer, from the open index and the milliseconds that the request waited
    kind: works of equal kind can be answered together, by `together`, which gives an outcome for each; None: alone
    size: queries in it
    """

    index: str | None
    call: Callable[[Index, float], T]
    kind: Hashable = None
    size: int = 1
    together: Callable[[Index, list[Work[T]], list[float]], list[Outcome]] | None = None
    request: Any = None  # what `together` reads


def answer(indexes: Indexes, works: list[tuple[Work[Any], float]], now: Callable[[], float]) -> list[Outcome]:
    """Answer the works of one batch, each with (its time of arrival). A work that fails fails alone."""
    waited = [(now() - arrived) * 1000.0 for _, arrived in works]
    first = works[0][0]
    if len(works) > 1 and first.together is not None:
        try:
            return first.together(indexes.get(first.index), [work for work, _ in works], waited)
        except Exception as error:  # one of them is at fault, or all are too much: each may do alone
            short = is_out_of_memory(error)
        if short:
            release_memory()
    return [_alone(indexes, work, waits) for (work, _), waits in zip(works, waited, strict=True)]


def _alone(indexes: Indexes, work: Work[Any], waited: float) -> Outcome:
    try:
        return work.call(indexes.get(work.index), waited)
    except Exception as error:  # handed to the caller, or to the log
        if not is_out_of_memory(error):
            return error
        told = str(error)
    release_memory()
    return OutOfMemoryError(told)
