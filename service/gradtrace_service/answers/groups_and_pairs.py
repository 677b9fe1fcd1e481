"""Answers on groups of training rows, and on training examples that are given with the request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import gradtrace
from gradtrace import Index, QueryError, Task
from gradtrace.models.queries import require_labels
from gradtrace_client.group_and_pair_schemas import Asked, Group, GroupInfluence, GroupsAnswer, PairsAnswer
from gradtrace_client.request_schemas import GroupsRequest, PairsRequest
from gradtrace_client.schemas import (
    Timing,
)
from gradtrace_service.answers.conventions import convention
from gradtrace_service.answers.influence import index_info
from gradtrace_service.answers.questions import (
    AskedExample,
    check_known,
    check_names,
    options_of,
    parsed_examples,
    queries_beside_training,
    queries_of,
    row_filter_of,
    train_row_examples,
)
from gradtrace_service.answers.unfit_queries import named_refusals
from gradtrace_service.errors import FieldError


def groups(index: Index, waited_ms: float, *, request: GroupsRequest) -> GroupsAnswer:
    """Answer POST /influence/groups.

    Raises:
        FieldError: a field names something that is not there, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    check_known("by", request.by, index.columns)
    queries = queries_of(index, request)
    with named_refusals(index, request, queries):
        found = index.group_influence(
            [query.example for query in queries],
            by=request.by,
            method=request.method,
            **options_of(request),
            filter=row_filter_of(request),
            target=request.target,
            aggregate=request.aggregate,
        )
    asked = [queries] if request.aggregate else [[query] for query in queries]
    named = request.by in ("label", "prediction")
    results = [
        GroupInfluence(query=_asked(index, some), groups=[_group(index.task, group, named) for group in own])
        for some, own in zip(asked, found, strict=True)
    ]
    return GroupsAnswer(
        index=index_info(index),
        method=request.method,
        convention=convention(request.method, options_of(request), fisher=index.manifest.fisher),
        by=request.by,
        results=results,
        timing_ms=_timing(waited_ms, len(queries), search=_since(started)),
    )


def pairs(index: Index, waited_ms: float, *, request: PairsRequest) -> PairsAnswer:
    """Answer POST /influence/pairs. Raises as `groups`."""
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    queries, train = queries_beside_training(index, request), _training_examples(index, request)
    with named_refusals(index, request, [*train, *queries]):
        scores = index.pairs(
            [one.example for one in train],
            [query.example for query in queries],
            method=request.method,
            **options_of(request),
            target=request.target,
        )
    return PairsAnswer(
        index=index_info(index),
        method=request.method,
        convention=convention(request.method, options_of(request), fisher=index.manifest.fisher),
        queries=[_asked(index, [query]) for query in queries],
        train=[_asked(index, [one]) for one in train],
        scores=scores.tolist(),
        timing_ms=_timing(waited_ms, len(queries), gradient=_since(started)),
    )


def _training_examples(index: Index, request: PairsRequest) -> list[AskedExample]:
    given = parsed_examples(index.task, request.train_examples or [], "train_examples")
    for at, one in enumerate(given):
        try:
            require_labels(index.task, [one.example])
        except QueryError as error:
            raise FieldError(f"train_examples[{at}]", str(error)) from error
    return given + train_row_examples(index, request.train_rows or [])


def _asked(index: Index, some: Sequence[AskedExample]) -> Asked:
    """One example, or several whose mean is asked about."""
    first, labels = some[0], {index.label(one.example) for one in some}
    label = labels.pop() if len(labels) == 1 else None
    row = first.row if len(some) == 1 else None
    return Asked(split=first.split, row=row, label=label, label_name=index.task.label_name(label), count=len(some))


def _group(task: Task, group: gradtrace.GroupInfluence, named: bool) -> Group:
    return Group(**asdict(group), group_name=task.label_name(group.group) if named else None)


def _timing(waited_ms: float, batch: int, gradient: float = 0.0, search: float = 0.0) -> Timing:
    total = waited_ms + gradient + search
    return Timing(queue=waited_ms, batch=batch, gradient=gradient, search=search, render=0.0, total=total)


def _since(moment: float) -> float:
    return (time.perf_counter() - moment) * 1000.0
