"""What a request asks of a worker. Works are pickled where workers are processes."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Protocol, TypeVar

import torch

from gradtrace import Index
from gradtrace.errors import QueryError, ShardLostError, StoreError, TaskError

T = TypeVar("T")

Outcome = Any  # a work's answer, or the exception that refuses it
Handler = Callable[[Index, Sequence[Any], Sequence[float]], Sequence[T | Exception]]

# PyTorch's allocator for CPUs, and C++ libraries, raise a RuntimeError that only its text tells apart.
_PHRASES = ("can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")  # the last: cuBLAS and cuDNN


class IndexUnavailableError(StoreError):
    """An index of the service cannot be opened as it is on disk now."""


class NoMemoryForIndexError(IndexUnavailableError):
    """Memory does not suffice to open an index now."""


class NotOpenYetError(Exception):
    """The index is being opened: the work waits on. No caller is told."""


class OutOfMemoryError(Exception):
    """Memory does not suffice to answer this request, even by itself."""


# Errors whose text is for the caller.
REFUSALS = (QueryError, TaskError, IndexUnavailableError, OutOfMemoryError, ShardLostError)


@dataclass(frozen=True, slots=True)
class Opening:
    """An index that is being opened.

    seconds: since it began;  still: since one of its files was last found right, or it began
    place: the line of the user's code that is running, if any is
    """

    seconds: float
    still: float
    place: str | None = None


class Indexes(Protocol):
    """Open indexes by name, of one worker."""

    def get(self, name: str | None) -> Index:
        """The index, for one batch.

        Raises:
            FieldError: no index has this name.
            NotOpenYetError: it is being opened.
            IndexUnavailableError: it cannot be opened.
        """

    def check(self, name: str | None, index: Index) -> None:
        """Raises NotOpenYetError or IndexUnavailableError if the files of an index that `get` gave were changed."""

    def open_default(self) -> None:
        """Open the first index. Raises IndexUnavailableError if it cannot be opened."""

    def states(self) -> dict[str, bool | None]:
        """By name: whether the index is open; None: it cannot be."""

    def openings(self) -> dict[str, Opening]:
        """By name: the indexes that are being opened, or of which a new generation is."""

    def close(self) -> None:
        """Nothing is opened or followed any more."""


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """A request for one index.

    index: its name; None: the only or first one
    handler: answers requests of one kind that wait together, each by an answer or the exception that refuses it. What
        the handler itself raises fails all of them. Called with the open index, the requests and the milliseconds that
        each waited.
    size: queries in the request
    kind: works of equal kind can be answered together; None: alone
    client: who asks, for a fair share among those who do
    internal: the service itself asks, which the limits on waiting requests are not for
    """

    index: str | None
    handler: Handler[T]
    request: Any = None
    size: int = 1
    kind: Hashable = None
    client: str = ""
    internal: bool = False


def each_alone(answer: Callable[[Index, Any, float], T]) -> Handler[T]:
    """The handler of requests that gain nothing from being answered together."""

    @wraps(answer)
    def handler(index: Index, requests: Sequence[Any], waited_ms: Sequence[float]) -> list[T]:
        return [answer(index, request, waited) for request, waited in zip(requests, waited_ms, strict=True)]

    return handler


def answer(indexes: Indexes, works: Sequence[Work[Any]], waited_ms: Sequence[float]) -> list[Outcome]:
    """Answer the works of one batch, which name the same index and handler. A work that fails fails alone."""
    name = works[0].index
    opened = _attempt(lambda: indexes.get(name))
    if isinstance(opened, Exception):  # for all of them, and it is not tried again: it may take long to fail
        return [opened] * len(works)
    outcomes = _answer(opened, works, waited_ms)
    damaged = _attempt(lambda: indexes.check(name, opened))  # also a refusal may be the fault of damaged rows
    return outcomes if damaged is None else [damaged] * len(works)


def _answer(index: Index, works: Sequence[Work[Any]], waited_ms: Sequence[float]) -> list[Outcome]:
    outcomes = _attempt(lambda: list(works[0].handler(index, [work.request for work in works], waited_ms)))
    if not isinstance(outcomes, Exception):
        return outcomes
    if len(works) == 1 or isinstance(outcomes, ShardLostError):  # which is no fault of a request
        return [outcomes] * len(works)
    del outcomes  # its traceback holds the tensors of every frame
    # One of the requests is at fault, or together they need too much memory: by halves, since those without the one at
    # fault are then answered in few passes.
    half = len(works) // 2
    return _answer(index, works[:half], waited_ms[:half]) + _answer(index, works[half:], waited_ms[half:])


def _attempt(compute: Callable[[], T]) -> T | Exception:
    """What it returns or raises; an error that means that memory ran out as OutOfMemoryError, with the caches freed."""
    try:
        return compute()
    except BaseException as error:  # handed to the caller, or to the log; a task may also call sys.exit
        if not is_out_of_memory(error):
            return error if isinstance(error, Exception) else _end_of_program(error)
        failure = OutOfMemoryError(str(error))
    gc.collect()  # only now: a live traceback keeps every frame's tensors
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    return failure


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, means that memory ran out."""
    if error is None:
        return False
    by_text = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
    by_number = isinstance(error, OSError) and error.errno == errno.ENOMEM  # of mmap and fork
    by_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return by_type or by_text or by_number or is_out_of_memory(error.__cause__)


def _end_of_program(error: BaseException) -> Exception:
    failure = RuntimeError(f"the task raised {type(error).__name__}, which would have ended the service: {error}")
    failure.__cause__ = error
    return failure
