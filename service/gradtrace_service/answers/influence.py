"""The answer to POST /influence, computed by the worker that owns the index."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

import gradtrace
from gradtrace import Index
from gradtrace.results.answering import Include
from gradtrace_client.request_schemas import InfluenceRequest
from gradtrace_client.schemas import Influence, InfluenceAnswer, QueryInfo, Timing
from gradtrace_service.answers import documents
from gradtrace_service.answers.questions import (
    AskedExample,
    check_names,
    check_prefilter,
    options_of,
    queries_of,
    row_filter_of,
    target_of,
)
from gradtrace_service.answers.rendering import rendered_rows, renderer
from gradtrace_service.answers.unfit_queries import unfit_queries
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError
from gradtrace_service.ops.timings import milliseconds_since


@dataclass(slots=True)
class _Question:
    """One request of a batch: its queries, or why it is refused."""

    request: InfluenceRequest
    waited_ms: float
    queries: list[AskedExample] = field(default_factory=list)
    refusal: FieldError | None = None

    @property
    def groups(self) -> list[list[AskedExample]]:
        """The queries of each result."""
        return [self.queries] if self.request.aggregate else [[query] for query in self.queries]


@each_alone
def warm_up(index: Index, request: None, waited_ms: float) -> int:
    """Ask about the first row that is there. Returns the worker's process id, to tell which workers are warm."""
    index.influence([index.task.train[int(np.argmax(index.present))]], k=1)
    return os.getpid()


def influence(
    index: Index, requests: Sequence[InfluenceRequest], waited_ms: Sequence[float]
) -> list[InfluenceAnswer | FieldError]:
    """Answer requests that differ only in their queries, in one pass, or in two where queries are at fault, on which
    the first pass fails. A FieldError takes the place of the answer where a field names something that does not exist,
    or an example that the task or the model cannot take.

    Raises:
        Exception: whatever makes all of them fail.
    """
    try:
        check_names(index, requests[0].method, requests[0].checkpoints)
        check_prefilter(index, requests[0].prefilter)
        target_of(index, requests[0])
    except FieldError as error:  # the same of each
        return [error] * len(requests)
    questions = [_read(index, request, waited) for request, waited in zip(requests, waited_ms, strict=True)]
    try:
        return _answers(index, questions)
    except Exception as error:
        _refuse_unfit(index, questions, error)
    return _answers(index, questions)


def _read(index: Index, request: InfluenceRequest, waited_ms: float) -> _Question:
    try:
        return _Question(request, waited_ms, queries_of(index, request))
    except FieldError as error:
        return _Question(request, waited_ms, refusal=error)


def _refuse_unfit(index: Index, questions: Sequence[_Question], error: Exception) -> None:
    """Refuse the questions whose queries made answering fail with `error`. Raises as `unfit_queries`."""
    asked = [(question, query) for question in questions for query in question.queries]
    refusals = unfit_queries(index, questions[0].request, [query for _, query in asked], error)
    for at in sorted(refusals, reverse=True):  # a question's first one stays
        asked[at][0].refusal = refusals[at]


def _answers(index: Index, questions: Sequence[_Question]) -> list[InfluenceAnswer | FieldError]:
    accepted = [question for question in questions if question.refusal is None]
    answers = iter(_search_and_render(index, accepted) if accepted else ())
    return [question.refusal or next(answers) for question in questions]


def _search_and_render(index: Index, questions: Sequence[_Question]) -> list[InfluenceAnswer]:
    started, request = time.perf_counter(), questions[0].request
    queries = [query for question in questions for query in question.queries]
    results = _search(index, request, [query.example for query in queries])
    rendering_started, remaining = time.perf_counter(), iter(results)
    rendered = [
        [_result(index, request, group, next(remaining)) for group in question.groups] for question in questions
    ]
    rescored = request.rescore or request.prefilter is not None
    rows_rescored = sum(result.rows_rescored for result in results)
    shared: dict[str, Any] = {
        **documents.head(index, request, rescored),
        "exact": all(result.exact for result in results),
        "recall": next((result.recall for result in results if result.recall), None),
        "rescored": rescored,
    }
    timing: dict[str, Any] = {
        **results.timing,
        "batch": len(queries),
        "rescore_per_row": results.timing["rescore"] / rows_rescored if rows_rescored else None,
        "render": milliseconds_since(rendering_started),
    }
    answering_ms = milliseconds_since(started)
    return [
        InfluenceAnswer.model_validate(
            {
                **shared,
                "results": results_of_one,
                "timing_ms": Timing(**timing, queue=question.waited_ms, total=question.waited_ms + answering_ms),
            },
            from_attributes=True,
        )
        for question, results_of_one in zip(questions, rendered, strict=True)
    ]


def _search(index: Index, request: InfluenceRequest, examples: list[Any]) -> gradtrace.InfluenceResults:
    return index.influence(
        examples,
        k=request.k,
        method=request.method,
        **options_of(request),
        filter=row_filter_of(request),
        target=target_of(index, request),
        rescore=request.rescore,
        prefilter=request.prefilter,
        candidates=request.candidates,
        aggregate=request.aggregate,
        include=[name for name in get_args(Include) if name in request.include],
    )


def _result(
    index: Index, request: InfluenceRequest, queries: Sequence[AskedExample], result: gradtrace.InfluenceResult
) -> Influence:
    render, parts = renderer(index, "examples" in request.include), "parts" in request.include
    return documents.document(
        Influence,
        result,
        query=_query_info(index, request, queries, result),
        proponents=[documents.hit(index.task, hit, render, parts) for hit in result.proponents],
        opponents=[documents.hit(index.task, hit, render, parts) for hit in result.opponents],
    )


def _query_info(
    index: Index, request: InfluenceRequest, queries: Sequence[AskedExample], result: gradtrace.InfluenceResult
) -> QueryInfo:
    first, several = queries[0], request.aggregate is not None
    rows = [query.row for query in queries if query.row is not None] or None
    shown = "examples" in request.include and not several
    return documents.document(
        QueryInfo,
        result,
        **documents.class_names(index.task, result),
        split=first.split,
        row=None if several else first.row,
        rows=rows if several else None,
        count=result.queries,
        probabilities=documents.probabilities(index.task, result),
        example=rendered_rows(index).example(first.example) if shown else None,
    )
