"""From a request to its answer, on the thread that owns the index."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import get_args

import numpy as np
from numpy.typing import NDArray

import gradtrace
from gradtrace import Index, RowFilter, Task
from gradtrace.results.answering import Include
from gradtrace.task import Example, Label
from gradtrace_client.request_schemas import InfluenceRequest, SelfInfluenceRequest
from gradtrace_client.schemas import (
    CheckpointInfo,
    Distribution,
    ExampleAnswer,
    Hit,
    IndexDetails,
    IndexInfo,
    Influence,
    InfluenceAnswer,
    QueryInfo,
    Recall,
    SelfInfluenceAnswer,
    Split,
    Timing,
)
from gradtrace_service.answers.conventions import convention
from gradtrace_service.answers.questions import (
    AskedExample,
    absent_row,
    check_names,
    missing_row,
    options_of,
    plain_label,
    queries_of,
    row_filter_of,
    split_size,
)
from gradtrace_service.answers.rendering import Show, renderings, shower
from gradtrace_service.answers.unfit_queries import unfit_queries
from gradtrace_service.engine.work import Outcome, Work
from gradtrace_service.errors import FieldError, NoSuchRowError

Asked = list[AskedExample] | FieldError  # the queries of a request, or why it is refused


def warm_up(index: Index, waited_ms: float) -> int:
    """Ask about the first row that is there. Returns the worker's process, to tell those that are warm."""
    index.influence([index.task.train[int(np.argmax(index.present))]], k=1)
    return os.getpid()


def one_influence(index: Index, waited_ms: float, *, request: InfluenceRequest) -> InfluenceAnswer:
    """Answer POST /influence.

    Raises:
        FieldError: a field names something that is not there, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query.
    """
    (outcome,) = _influences(index, [request], [waited_ms])
    if isinstance(outcome, FieldError):
        raise outcome
    return outcome


def influences(index: Index, works: Sequence[Work[InfluenceAnswer]], waited_ms: Sequence[float]) -> list[Outcome]:
    """Answer several that may be answered together; those at fault have their FieldError instead of an answer.

    Raises:
        Exception: what fails all of them.
    """
    return list(_influences(index, [work.request for work in works], waited_ms))


def _influences(
    index: Index, requests: Sequence[InfluenceRequest], waited_ms: Sequence[float]
) -> list[InfluenceAnswer | FieldError]:
    """Answer one or several POST /influence that differ in what is asked about alone, in one pass, or in two where some
    are at fault: the first pass fails on these."""
    check_names(index, requests[0].method, requests[0].checkpoints)
    asked = [_read_queries(index, request) for request in requests]
    try:
        return _fit_answered(index, requests, asked, waited_ms)
    except Exception as error:
        return _fit_answered(index, requests, _without_unfit(index, requests[0], asked, error), waited_ms)


def _read_queries(index: Index, request: InfluenceRequest) -> Asked:
    try:
        return queries_of(index, request)
    except FieldError as error:
        return error


def _without_unfit(index: Index, request: InfluenceRequest, asked: Sequence[Asked], error: Exception) -> list[Asked]:
    """What is asked, with the refusal in the place of each request that the task or the model cannot take."""
    queries = [query for some in asked if isinstance(some, list) for query in some]
    refusals = {id(queries[at]): refusal for at, refusal in unfit_queries(index, request, queries, error).items()}

    def checked(some: Asked) -> Asked:
        refused = [] if isinstance(some, FieldError) else [refusals[id(one)] for one in some if id(one) in refusals]
        return refused[0] if refused else some

    return [checked(some) for some in asked]


def _fit_answered(
    index: Index, requests: Sequence[InfluenceRequest], asked: Sequence[Asked], waited_ms: Sequence[float]
) -> list[InfluenceAnswer | FieldError]:
    """The answers to all requests that are not refused already."""
    fit = [(request, some, waited) for request, some, waited in zip(requests, asked, waited_ms, strict=True)
           if isinstance(some, list)]  # fmt: skip
    answers = iter(_answered(index, *zip(*fit, strict=True)) if fit else ())
    return [next(answers) if isinstance(some, list) else some for some in asked]


def _answered(
    index: Index,
    requests: Sequence[InfluenceRequest],
    asked: Sequence[list[AskedExample]],
    waited_ms: Sequence[float],
) -> list[InfluenceAnswer]:
    started, request = time.perf_counter(), requests[0]
    queries = [query for some in asked for query in some]
    results = _search(index, request, [query.example for query in queries])
    found, spent = time.perf_counter(), results.timing
    show = shower(index, "examples" in request.include)
    remaining, rendered = iter(results), []
    for some in asked:
        groups = [some] if request.aggregate else [[query] for query in some]
        own = list(islice(remaining, len(groups)))
        rendered.append([_influence(index, request, *pair, show) for pair in zip(groups, own, strict=True)])
    rows_rescored = sum(result.rows_rescored for result in results)
    timing = Timing(
        queue=0.0,
        batch=len(queries),
        gradient=spent["gradient"],
        search=spent["search"],
        rescore=spent["rescore"],
        rescore_per_row=spent["rescore"] / rows_rescored if rows_rescored else None,
        percentiles=spent["percentiles"],
        render=_since(found),
        total=_since(started),
    )
    recall = next((Recall(top=r.recall.top, bottom=r.recall.bottom) for r in results if r.recall), None)
    return [
        InfluenceAnswer(
            index=index_info(index),
            method=request.method,
            convention=convention(request.method, options_of(request), request.rescore, index.manifest.fisher),
            exact=all(result.exact for result in results),
            recall=recall,
            rescored=request.rescore,
            results=own_results,
            timing_ms=timing.model_copy(update={"queue": waited, "total": waited + timing.total}),
        )
        for own_results, waited in zip(rendered, waited_ms, strict=True)
    ]


def self_influence(index: Index, waited_ms: float, *, request: SelfInfluenceRequest) -> SelfInfluenceAnswer:
    """Answer GET /self-influence.

    Raises:
        FieldError: a field names something that is not there.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    scores = index.self_influence(method=request.method, **options_of(request))
    rows = _rows_with_labels(index, request.labels)
    keys = -scores[rows] if request.order == "descending" else scores[rows]
    page = rows[np.argsort(keys, kind="stable")][request.offset : request.offset + request.k]
    found = time.perf_counter()
    show = shower(index, request.examples)
    hits = [_row_hit(index, int(row), float(scores[row]), show) for row in page]
    return SelfInfluenceAnswer(
        index=index_info(index),
        method=request.method,
        convention=convention(request.method, options_of(request), fisher=index.manifest.fisher),
        rows_total=len(rows),
        results=hits,
        timing_ms=Timing(
            queue=waited_ms,
            gradient=0.0,
            search=(found - started) * 1000.0,
            render=_since(found),
            total=waited_ms + _since(started),
        ),
    )


def example(index: Index, waited_ms: float, *, split: Split, row: int) -> ExampleAnswer:
    """Answer GET /examples/{split}/{row}.

    Raises:
        NoSuchRowError: the split has no such row.
    """
    size = split_size(index, split)
    if row >= size:
        raise NoSuchRowError("row", missing_row(split, row, size))
    if split == "train" and not index.present[row]:
        raise NoSuchRowError("row", absent_row(index, row))
    if split == "train":
        hit = _row_hit(index, row, 0.0, shower(index, True))
        return ExampleAnswer(split=split, **hit.model_dump(exclude={"score", "parts", "layers", "percentile"}))
    found = index.task.query[row]
    label = index.label(found)
    return ExampleAnswer(
        split=split,
        row=row,
        label=label,
        label_name=index.task.label_name(label),
        prediction=None,
        prediction_name=None,
        loss=None,
        correct=None,
        example=renderings(index).example(found),
    )


def index_info(index: Index) -> IndexInfo:
    """Which index it is; nothing of where it lies."""
    manifest = index.manifest
    return IndexInfo(
        generation=manifest.generation,
        task=manifest.task.name,
        rows=index.rows,
        checkpoints=[
            CheckpointInfo(**entry.model_dump(include=set(CheckpointInfo.model_fields)))
            for entry in manifest.checkpoints
        ],
        dimensions=manifest.basis.dimensions,
        basis=manifest.basis.kind,
        precision=manifest.precision,
    )


def index_details(index: Index, waited_ms: float) -> IndexDetails:
    """Answer GET /index."""
    names, manifest = index.task.class_names, index.manifest
    return IndexDetails(
        **index_info(index).model_dump(),
        methods=list(index.methods),
        class_names=None if names is None else list(names),
        query_rows=split_size(index, "query"),
        conventions={method: convention(method, fisher=manifest.fisher) for method in index.methods},
    )


def _search(index: Index, request: InfluenceRequest, examples: list[Example]) -> gradtrace.InfluenceResults:
    return index.influence(
        examples,
        k=request.k,
        method=request.method,
        **options_of(request),
        filter=row_filter_of(request),
        target=request.target,
        rescore=request.rescore,
        aggregate=request.aggregate,
        include=[name for name in get_args(Include) if name in request.include],
    )


def _influence(
    index: Index,
    request: InfluenceRequest,
    group: Sequence[AskedExample],
    result: gradtrace.InfluenceResult,
    show: Show,
) -> Influence:
    task, parts, distribution = index.task, "parts" in request.include, result.distribution
    return Influence(
        query=_query_info(index, request, group, result),
        proponents=[_hit(task, hit, show, parts) for hit in result.proponents],
        opponents=[_hit(task, hit, show, parts) for hit in result.opponents],
        rows_searched=result.rows_searched,
        rows_touched=result.rows_touched,
        rows_rescored=result.rows_rescored,
        distribution=None if distribution is None else Distribution(**asdict(distribution)),
        note=result.note,
    )


def _query_info(
    index: Index, request: InfluenceRequest, group: Sequence[AskedExample], result: gradtrace.InfluenceResult
) -> QueryInfo:
    task, query, several = index.task, group[0], request.aggregate is not None
    return QueryInfo(
        split=query.split,
        row=None if several else query.row,
        rows=[one.row for one in group if one.row is not None] or None if several else None,
        count=result.queries,
        target=result.target,
        label=result.label,
        label_name=task.label_name(result.label),
        prediction=result.prediction,
        prediction_name=task.label_name(result.prediction),
        loss=result.loss,
        example=renderings(index).example(query.example) if "examples" in request.include and not several else None,
    )


def _hit(task: Task, hit: gradtrace.Hit, show: Show, parts: bool) -> Hit:
    return Hit(
        row=hit.row,
        score=hit.score,
        label=hit.label,
        label_name=task.label_name(hit.label),
        prediction=hit.prediction,
        prediction_name=task.label_name(hit.prediction),
        loss=hit.loss,
        correct=hit.correct,
        parts=hit.parts if parts else None,
        layers=hit.layers,
        percentile=hit.percentile,
        example=show(hit.row),
    )


def _row_hit(index: Index, row: int, score: float, show: Show) -> Hit:
    task, columns = index.task, index.columns
    label = plain_label(task, columns["label"][row])
    prediction = plain_label(task, columns["prediction"][row])
    correct = columns["correct"][row]
    return Hit(
        row=row,
        score=score,
        label=label,
        label_name=task.label_name(label),
        prediction=prediction,
        prediction_name=task.label_name(prediction),
        loss=float(columns["loss"][row]),
        correct=None if correct is None else bool(correct),
        parts=None,
        example=show(row),
    )


def _rows_with_labels(index: Index, labels: Sequence[Label] | None) -> NDArray[np.int64]:
    mask = RowFilter(labels=labels).mask(index.rows, index.columns)
    return np.flatnonzero(index.present if mask is None else mask & index.present)


def _since(moment: float) -> float:
    return (time.perf_counter() - moment) * 1000.0
