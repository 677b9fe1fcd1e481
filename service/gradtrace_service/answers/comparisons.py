"""The comparison of two questions, which may be about two indexes: each side is scored by a work of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gradtrace import Comparison, Index, QueryError, Scores, compare_scores
from gradtrace_client.comparison_schemas import (
    ComparedPoints,
    ComparedSide,
    CompareRequest,
    ComparisonAnswer,
    Overlap,
)
from gradtrace_client.request_schemas import ScoresQuestion
from gradtrace_service.answers import documents
from gradtrace_service.answers.groups_and_pairs import asked_about
from gradtrace_service.answers.questions import check_names, options_of, queries_of, target_of
from gradtrace_service.answers.unfit_queries import named_refusals
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError
from gradtrace_service.ops.timings import milliseconds_since


@dataclass(frozen=True, slots=True)
class ScoredSide:
    """Of the first side, for the second. Pickled where workers are processes.

    ms: that its work waited and computed
    """

    described: ComparedSide
    scores: Scores
    queries: int
    waited_ms: float
    computed_ms: float


@each_alone
def first_side(index: Index, request: CompareRequest, waited_ms: float) -> ScoredSide:
    """The scores of the first question. Raises FieldError as `comparison`."""
    return _scored(index, request, "first", waited_ms)


@each_alone
def comparison(index: Index, asked: tuple[CompareRequest, ScoredSide], waited_ms: float) -> ComparisonAnswer:
    """Answer POST /influence/compare, given the first side, by the index of the second.

    Raises:
        FieldError: a field names something that does not exist, or an example that the task or the model cannot take;
            or the sides are of different numbers of rows.
        GradtraceError: an index refuses the query.
    """
    request, first = asked
    second, started = _scored(index, request, "second", waited_ms), time.perf_counter()
    try:
        compared = compare_scores(first.scores, second.scores, request.k)
    except QueryError as error:
        raise FieldError("second.index", str(error)) from error
    return _answer(request, first, second, compared, milliseconds_since(started))


def _scored(index: Index, request: CompareRequest, side: Literal["first", "second"], waited_ms: float) -> ScoredSide:
    question: ScoresQuestion = getattr(request, side)
    started = time.perf_counter()
    with _named(side):
        check_names(index, question.method, question.checkpoints)
        target, queries = target_of(index, question), queries_of(index, question)
        with named_refusals(index, question, queries):
            examples = [query.example for query in queries]
            scores = index.mean_scores(examples, method=question.method, target=target, **options_of(question))
    query = asked_about(index, queries, scores.target)
    head = documents.head(index, question)
    described = ComparedSide(**head, query=query, target=scores.target)
    return ScoredSide(described, scores, len(queries), waited_ms, milliseconds_since(started))


@contextmanager
def _named(side: str) -> Iterator[None]:
    """Fields of a question are named as those of a side."""
    try:
        yield
    except FieldError as refusal:
        raise type(refusal)(f"{side}.{refusal.field}", refusal.detail) from refusal


def _answer(
    request: CompareRequest, first: ScoredSide, second: ScoredSide, compared: Comparison, compared_ms: float
) -> ComparisonAnswer:
    waited, computed = (sum(getattr(side, name) for side in (first, second)) for name in ("waited_ms", "computed_ms"))
    return ComparisonAnswer(
        first=first.described,
        second=second.described,
        pearson=compared.pearson,
        spearman=compared.spearman,
        k=request.k,
        overlap=Overlap(proponents=compared.proponents, opponents=compared.opponents),
        points=ComparedPoints(
            row=compared.points.tolist(), first=compared.first.tolist(), second=compared.second.tolist()
        ),
        rows=compared.rows,
        timing_ms=documents.timing(waited, max(first.queries, second.queries), search=computed, render=compared_ms),
    )
