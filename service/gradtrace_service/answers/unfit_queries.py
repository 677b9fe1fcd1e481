"""Which queries of a request made it fail: those that the task or its model cannot take are refused by their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from gradtrace import Index
from gradtrace.errors import DatasetError, QueryError, TaskError
from gradtrace_client.request_schemas import PairsRequest, ScoresQuestion
from gradtrace_service.answers.questions import AskedExample, options_of, target_of
from gradtrace_service.engine.work import is_out_of_memory
from gradtrace_service.errors import FieldError

T = TypeVar("T")
Asking = ScoresQuestion | PairsRequest
Failures = list[tuple[int, Exception]]  # positions in a sequence, with what the item there raised by itself

# What code raises on values that it does not expect. Other errors are the machine's, and their text may name files.
_VALUE_ERRORS = (QueryError, TaskError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError,
                 TypeError, ValueError)  # fmt: skip


def unfit_queries(
    index: Index, request: Asking, queries: Sequence[AskedExample], error: Exception
) -> dict[int, FieldError]:
    """Find the queries that made answering them together raise `error`, by their positions in `queries`. Those of a
    micro-batch may come from several requests that differ in nothing else.

    Raises:
        Exception: `error`, where a training row of the index fails as well, or no query fails by itself: then the fault
            lies elsewhere.
        FieldError: the queries can be asked about one by one, but not together.
    """
    if isinstance(error, DatasetError) or not isinstance(error, _VALUE_ERRORS) or is_out_of_memory(error):
        raise error

    target = target_of(index, request)

    def attempt(asked: Sequence[AskedExample]) -> None:
        examples = [query.example for query in asked]
        index.try_queries(examples, method=request.method, target=target, **options_of(request))

    indexed = index.task.train[int(np.argmax(index.present))]
    if failing_alone(attempt, [AskedExample(indexed, "")]):
        raise error
    failures = failing_alone(attempt, queries)
    if any(is_out_of_memory(failure) for _, failure in failures):
        raise error
    if not failures:
        _refuse_together(attempt, queries)
        raise error
    return {at: _refusal(index, queries[at].field, failure) for at, failure in failures}


@contextmanager
def named_refusals(index: Index, request: Asking, queries: Sequence[AskedExample]) -> Iterator[None]:
    """When the block fails, raise the first of the refusals that `unfit_queries` finds. Raises as that."""
    try:
        yield
    except Exception as error:
        refusals = unfit_queries(index, request, queries, error)
        raise refusals[min(refusals)] from error


def failing_alone(attempt: Callable[[Sequence[T]], object], items: Sequence[T]) -> Failures:
    """The items on which `attempt` raises, by bisection: few failures among many items take few attempts."""
    try:
        attempt(items)
    except Exception as error:
        if len(items) == 1:
            return [(0, error)]
        half = len(items) // 2
        later = failing_alone(attempt, items[half:])
        return failing_alone(attempt, items[:half]) + [(half + at, failure) for at, failure in later]
    return []


def _refuse_together(attempt: Callable[[Sequence[AskedExample]], object], queries: Sequence[AskedExample]) -> None:
    try:
        attempt(queries)
    except _VALUE_ERRORS as error:
        field = queries[0].field.partition("[")[0]
        detail = f"each can be asked about, but not all in one batch: send them one by one ({_described(error)})"
        raise FieldError(field, detail) from error


def _refusal(index: Index, field: str, error: Exception) -> FieldError:
    if isinstance(error, QueryError | TaskError):
        return FieldError(field, str(error))
    if not isinstance(error, _VALUE_ERRORS):
        raise error
    remedy = "send one like those that it was trained on"
    return FieldError(field, f"{type(index.task).__name__} or its model cannot take it: {_described(error)}; {remedy}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
