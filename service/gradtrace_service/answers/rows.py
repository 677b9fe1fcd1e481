"""Training rows by their influence on themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

import gradtrace
from gradtrace import Index, RowFilter, Task
from gradtrace.methods import MethodOptions
from gradtrace.task import Label
from gradtrace_client.request_schemas import SelfInfluenceRequest
from gradtrace_client.schemas import SelfInfluenceAnswer
from gradtrace_service.answers import documents
from gradtrace_service.answers.questions import check_names, options_of
from gradtrace_service.answers.rendering import renderer
from gradtrace_service.engine.work import each_alone
from gradtrace_service.ops.timings import milliseconds_since

# What was asked for, and the scores: 4 bytes a row. They end with their generation.
_last_scores: WeakKeyDictionary[Index, tuple[str, NDArray[np.float32]]] = WeakKeyDictionary()


@each_alone
def self_influence(index: Index, request: SelfInfluenceRequest, waited_ms: float) -> SelfInfluenceAnswer:
    """Answer GET /self-influence.

    Raises:
        FieldError: a field names something that does not exist.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    scores = self_influence_of_all(index, request)
    rows = _rows_with_labels(index, request.labels)
    keys = -scores[rows] if request.order == "descending" else scores[rows]
    page = rows[np.argsort(keys, kind="stable")][request.offset : request.offset + request.k]
    searched, search_ms = time.perf_counter(), milliseconds_since(started)
    render = renderer(index, request.examples)
    hits = [documents.hit(index.task, _stored_hit(index, int(row), float(scores[row])), render) for row in page]
    return SelfInfluenceAnswer(
        **documents.head(index, request),
        rows_total=len(rows),
        results=hits,
        timing_ms=documents.timing(waited_ms, search=search_ms, render=milliseconds_since(searched)),
    )


def self_influence_of_all(index: Index, request: SelfInfluenceRequest) -> NDArray[np.float32]:
    """Of all rows, kept until something else is asked for: who reads them page by page has them computed once."""
    asked = request.model_dump_json(include={"method", *MethodOptions.__annotations__})
    known = _last_scores.get(index)
    if known is None or known[0] != asked:
        known = _last_scores[index] = asked, index.self_influence(method=request.method, **options_of(request))
    return known[1]


def _stored_hit(index: Index, row: int, score: float) -> gradtrace.Hit:
    """A row of the index as the hit of a query that gives it this score."""
    label, prediction, loss, correct = (index.columns[name][row] for name in ("label", "prediction", "loss", "correct"))
    return gradtrace.Hit(
        row=row,
        score=score,
        parts={},
        label=_label(index.task, label),
        prediction=_label(index.task, prediction),
        loss=float(loss),
        correct=None if correct is None else bool(correct),
    )


def _label(task: Task, cell: Any) -> Label | None:
    """A cell of a label column, which holds classes as floating point where other rows have none."""
    if cell is None or np.isnan(cell):
        return None
    label: Label = cell.item() if isinstance(cell, np.generic) else cell
    return int(label) if task.class_names is not None else label


def _rows_with_labels(index: Index, labels: Sequence[Label] | None) -> NDArray[np.int64]:
    mask = RowFilter(labels=labels).mask(index.rows, index.columns)
    return np.flatnonzero(index.present if mask is None else mask & index.present)
