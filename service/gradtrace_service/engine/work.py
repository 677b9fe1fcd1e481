"""What a request asks of a worker. Works are pickled where workers are processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Protocol, TypeVar

from gradtrace import Index
from gradtrace.errors import QueryError, StoreError, TaskError
from gradtrace_service.engine.memory import is_out_of_memory, release_memory

T = TypeVar("T")

Outcome = Any  # a work's answer, or the exception that refuses it
Handler = Callable[[Index, Sequence[Any], Sequence[float]], Sequence[T | Exception]]


class IndexUnavailableError(StoreError):
    """An index of the service cannot be opened as it is on disk now."""


class OutOfMemoryError(Exception):
    """Memory does not suffice to answer this request, even by itself."""


# Errors whose text is for the caller.
REFUSALS = (QueryError, TaskError, IndexUnavailableError, OutOfMemoryError)


class Indexes(Protocol):
    """Open indexes by name."""

    def get(self, name: str | None) -> Index:
        """Raises FieldError for a name that is not there, IndexUnavailableError for an index that cannot be opened."""


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """A request for one index.

    index: its name; None: the only or first one
    handler: answers requests of one kind that wait together, each by an answer or the exception that refuses it. What
        the handler itself raises fails all of them. Called with the open index, the requests and the milliseconds that
        each waited.
    size: queries in the request
    kind: works of equal kind can be answered together; None: alone
    """

    index: str | None
    handler: Handler[T]
    request: Any = None
    size: int = 1
    kind: Hashable = None


def each_alone(answer: Callable[[Index, Any, float], T]) -> Handler[T]:
    """The handler of requests that gain nothing from being answered together."""

    @wraps(answer)
    def handler(index: Index, requests: Sequence[Any], waited_ms: Sequence[float]) -> list[T]:
        return [answer(index, request, waited) for request, waited in zip(requests, waited_ms, strict=True)]

    return handler


def answer(indexes: Indexes, works: list[tuple[Work[Any], float]], now: Callable[[], float]) -> list[Outcome]:
    """Answer the works of one batch, each with (its time of arrival). A work that fails fails alone."""
    waited_ms = [(now() - arrived) * 1000.0 for _, arrived in works]
    return _answer(indexes, [work for work, _ in works], waited_ms)


def _answer(indexes: Indexes, works: Sequence[Work[Any]], waited_ms: Sequence[float]) -> list[Outcome]:
    first = works[0]
    try:
        return list(first.handler(indexes.get(first.index), [work.request for work in works], waited_ms))
    except Exception as error:  # handed to the caller, or to the log
        failure = OutOfMemoryError(str(error)) if is_out_of_memory(error) else error
    if isinstance(failure, OutOfMemoryError):
        release_memory()
    if len(works) == 1:
        return [failure]
    del failure  # its traceback holds the tensors of every frame
    # One of the requests is at fault, or together they need too much memory.
    alone = (_answer(indexes, [work], [waited]) for work, waited in zip(works, waited_ms, strict=True))
    return [outcome for outcomes in alone for outcome in outcomes]
