"""From a request to its answer, on the thread that owns the index."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

import gradtrace
from gradtrace import Index, RowFilter, Task
from gradtrace.errors import GradtraceError
from gradtrace.index import Include
from gradtrace.methods import Options
from gradtrace.task import Example, Label
from gradtrace_client.schemas import (
    CheckpointInfo,
    Distribution,
    ExampleAnswer,
    Hit,
    IndexDetails,
    IndexInfo,
    Influence,
    InfluenceAnswer,
    InfluenceRequest,
    Payload,
    QueryInfo,
    Question,
    Recall,
    SelfInfluenceAnswer,
    SelfInfluenceRequest,
    Split,
    Timing,
)
from gradtrace_service.conventions import convention
from gradtrace_service.problems import FieldError, NoSuchRowError

Show = Callable[[int], Payload | None]  # training row -> its rendering, None where it was not asked for


@dataclass(frozen=True, slots=True)
class _Query:
    example: Example
    split: Split | None = None
    row: int | None = None


def influence(index: Index, request: InfluenceRequest, waited_ms: float) -> InfluenceAnswer:
    """Answer POST /influence.

    Raises:
        FieldError: a field names something that is not there, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    _check_names(index, request.method, request.checkpoints)
    queries = _queries(index, request)
    results = _search(index, request, [query.example for query in queries])
    found, spent = time.perf_counter(), index.last_timing
    show = _shower(index.task, "examples" in request.include)
    groups = [queries] if request.aggregate else [[query] for query in queries]
    answered = [
        _influence(index.task, request, group, result, show) for group, result in zip(groups, results, strict=True)
    ]
    rows_rescored = sum(result.rows_rescored for result in results)
    return InfluenceAnswer(
        index=index_info(index),
        method=request.method,
        convention=convention(request.method, _options(request), request.rescore),
        exact=all(result.exact for result in results),
        recall=next((Recall(top=r.recall.top, bottom=r.recall.bottom) for r in results if r.recall), None),
        rescored=request.rescore,
        results=answered,
        timing_ms=Timing(
            queue=waited_ms,
            gradient=spent["gradient"],
            search=spent["search"],
            rescore=spent["rescore"],
            rescore_per_row=spent["rescore"] / rows_rescored if rows_rescored else None,
            percentiles=spent["percentiles"],
            render=_since(found),
            total=waited_ms + _since(started),
        ),
    )


def self_influence(index: Index, request: SelfInfluenceRequest, waited_ms: float) -> SelfInfluenceAnswer:
    """Answer GET /self-influence.

    Raises:
        FieldError: a field names something that is not there.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    _check_names(index, request.method, request.checkpoints)
    scores = index.self_influence(method=request.method, **asdict(_options(request)))
    rows = _rows_with_labels(index, request.labels)
    keys = -scores[rows] if request.order == "descending" else scores[rows]
    page = rows[np.argsort(keys, kind="stable")][request.offset : request.offset + request.k]
    found = time.perf_counter()
    show = _shower(index.task, request.examples)
    hits = [_row_hit(index, int(row), float(scores[row]), show) for row in page]
    return SelfInfluenceAnswer(
        index=index_info(index),
        method=request.method,
        convention=convention(request.method, _options(request)),
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


def example(index: Index, split: Split, row: int) -> ExampleAnswer:
    """Answer GET /examples/{split}/{row}.

    Raises:
        NoSuchRowError: the split has no such row.
    """
    size = _size(index, split)
    if row >= size:
        raise NoSuchRowError("row", _missing_row(split, row, size))
    if split == "train" and not index.present[row]:
        raise NoSuchRowError("row", _deleted_row(row))
    if split == "train":
        hit = _row_hit(index, row, 0.0, _shower(index.task, True))
        return ExampleAnswer(split=split, **hit.model_dump(exclude={"score", "parts", "layers", "percentile"}))
    found = index.task.query[row]
    label = index.task.label(found)
    return ExampleAnswer(
        split=split,
        row=row,
        label=label,
        label_name=index.task.label_name(label),
        prediction=None,
        prediction_name=None,
        loss=None,
        correct=None,
        example=index.task.render(found),
    )


def index_info(index: Index) -> IndexInfo:
    """Which index it is; nothing of where it lies."""
    manifest = index.manifest
    return IndexInfo(
        generation=manifest.generation,
        task=manifest.task.name,
        rows=index.rows,
        checkpoints=[
            CheckpointInfo(name=entry.name, step=entry.step, learning_rate=entry.learning_rate)
            for entry in manifest.checkpoints
        ],
        dimensions=manifest.basis.dimensions,
        basis=manifest.basis.kind,
        precision=manifest.precision,
    )


def index_details(index: Index) -> IndexDetails:
    """Answer GET /index."""
    names = index.task.class_names
    return IndexDetails(
        **index_info(index).model_dump(),
        methods=list(index.methods),
        class_names=None if names is None else list(names),
        query_rows=_size(index, "query"),
        conventions={method: convention(method) for method in index.methods},
    )


def _check_names(index: Index, method: str, checkpoints: Sequence[str] | None) -> None:
    _check_known("method", method, index.methods)
    known = [entry.name for entry in index.manifest.checkpoints]
    for position, name in enumerate(checkpoints or ()):
        _check_known(f"checkpoints[{position}]", name, known)


def _check_known(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise FieldError(field, f"there is no {name!r}; this index has {', '.join(known)}")


def _queries(index: Index, request: InfluenceRequest) -> list[_Query]:
    task = index.task
    if request.query_rows is not None:
        return _row_queries("query", task.query, request.query_rows)
    if request.train_rows is not None:
        found = _row_queries("train", task.train, request.train_rows)
        for position, row in enumerate(request.train_rows):
            if not index.present[row]:
                raise FieldError(f"train_rows[{position}]", _deleted_row(row))
        return found
    if request.example is not None:
        return [_Query(_parsed(task, request.example, "example"))]
    payloads = request.examples or []
    return [_Query(_parsed(task, payload, f"examples[{at}]")) for at, payload in enumerate(payloads)]


def _row_queries(split: Split, dataset: Any, rows: Sequence[int]) -> list[_Query]:
    size = 0 if dataset is None else len(dataset)
    for position, row in enumerate(rows):
        if row >= size:
            raise FieldError(f"{split}_rows[{position}]", _missing_row(split, row, size))
    return [_Query(dataset[row], split, row) for row in rows]


def _deleted_row(row: int) -> str:
    return f"row {row} of the training data was deleted from the index"


def _missing_row(split: Split, row: int, size: int) -> str:
    if size == 0:
        return f"the task has no {split} data set; ask by example or by train_rows"
    return f"there is no row {row} in the {split} data set; its rows are 0 to {size - 1}"


def _size(index: Index, split: Split) -> int:
    if split == "train":
        return index.rows
    return 0 if index.task.query is None else len(index.task.query)


def _parsed(task: Task, payload: Payload, field: str) -> Example:
    try:
        return task.parse(payload)
    except GradtraceError as error:
        raise FieldError(field, str(error)) from error
    except Exception as error:  # whatever a user's parse makes of a payload that it did not expect
        raise FieldError(field, f"{type(task).__name__} cannot read it: {type(error).__name__}: {error}") from error


def _search(index: Index, request: InfluenceRequest, examples: list[Example]) -> list[gradtrace.InfluenceResult]:
    try:
        return index.influence(
            examples,
            k=request.k,
            method=request.method,
            **asdict(_options(request)),
            filter=_row_filter(request),
            target=request.target,
            rescore=request.rescore,
            aggregate=request.aggregate,
            include=[name for name in get_args(Include) if name in request.include],
        )
    except (RuntimeError, ValueError) as error:
        sent = next((name for name in ("example", "examples") if getattr(request, name) is not None), None)
        if sent is None or type(error) not in (
            RuntimeError,
            ValueError,
        ):  # out of memory, a device's failure: not theirs
            raise
        raise FieldError(sent, f"the model cannot take it: {error}") from error


def _options(request: Question) -> Options:
    return Options(**{field.name: getattr(request, field.name) for field in fields(Options)})


def _row_filter(request: InfluenceRequest) -> RowFilter | None:
    if request.filter is None:
        return None
    return RowFilter(**request.filter.model_dump(by_alias=True, exclude_none=True))


def _influence(
    task: Task, request: InfluenceRequest, group: Sequence[_Query], result: gradtrace.InfluenceResult, show: Show
) -> Influence:
    parts, distribution = "parts" in request.include, result.distribution
    return Influence(
        query=_query_info(task, request, group, result),
        proponents=[_hit(task, hit, show, parts) for hit in result.proponents],
        opponents=[_hit(task, hit, show, parts) for hit in result.opponents],
        rows_searched=result.rows_searched,
        rows_touched=result.rows_touched,
        rows_rescored=result.rows_rescored,
        distribution=None if distribution is None else Distribution(**asdict(distribution)),
    )


def _query_info(
    task: Task, request: InfluenceRequest, group: Sequence[_Query], result: gradtrace.InfluenceResult
) -> QueryInfo:
    query, several = group[0], request.aggregate is not None
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
        example=task.render(query.example) if "examples" in request.include and not several else None,
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
    label = _label(task, columns["label"][row])
    prediction = _label(task, columns["prediction"][row])
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


def _label(task: Task, value: Any) -> Label | None:
    """A cell of a label column; whole numbers come as floating point where other rows have none."""
    if value is None or np.isnan(value):
        return None
    label: Label = value.item() if isinstance(value, np.generic) else value
    return int(label) if task.class_names is not None else label


def _rows_with_labels(index: Index, labels: Sequence[Label] | None) -> NDArray[np.int64]:
    mask = RowFilter(labels=labels).mask(index.rows, index.columns)
    return np.flatnonzero(index.present if mask is None else mask & index.present)


def _shower(task: Task, wanted: bool) -> Show:
    """Renders training rows, each once: the hits of a batch of queries overlap."""
    return functools.cache(lambda row: task.render(task.train[row]) if wanted else None)


def _since(moment: float) -> float:
    return (time.perf_counter() - moment) * 1000.0
