"""Answers about groups of training rows, and about training examples that are given with the request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

import gradtrace
from gradtrace import Index, QueryError, Task
from gradtrace.models.queries import Query, joined_targets, require_labels
from gradtrace.task import Label
from gradtrace.tasks.features import feature_names, in_memory
from gradtrace_client.group_and_pair_schemas import Asked, Group, GroupInfluence, GroupsAnswer, PairsAnswer
from gradtrace_client.request_schemas import FEATURE, GroupsRequest, PairsRequest
from gradtrace_service.answers import documents
from gradtrace_service.answers.inputs import READ_ROWS
from gradtrace_service.answers.questions import (
    AskedExample,
    check_known,
    check_names,
    options_of,
    parsed_examples,
    queries_of,
    row_examples,
    row_filter_of,
    target_of,
)
from gradtrace_service.answers.unfit_queries import named_refusals
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError
from gradtrace_service.ops.timings import milliseconds_since


@each_alone
def groups(index: Index, request: GroupsRequest, waited_ms: float) -> GroupsAnswer:
    """Answer POST /influence/groups.

    Raises:
        FieldError: a field names something that does not exist, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    _check_column(index, request.by)
    asked_queries = queries_of(index, request)
    with named_refusals(index, request, asked_queries):
        queries = _resolved(index, request, asked_queries)
        influences = index.group_influence(
            queries,
            by=request.by,
            method=request.method,
            **options_of(request),
            filter=row_filter_of(request),
            aggregate=request.aggregate,
        )
    targets = [query.target for query in queries]
    asked = [asked_queries] if request.aggregate else [[query] for query in asked_queries]
    explained = [joined_targets(targets)] if request.aggregate else targets
    classes = index.task if request.by in ("label", "prediction") else None
    return GroupsAnswer(
        **documents.head(index, request),
        by=request.by,
        results=[
            GroupInfluence(
                query=asked_about(index, examples, words), groups=[_group(group, classes) for group in influence]
            )
            for examples, words, influence in zip(asked, explained, influences, strict=True)
        ],
        timing_ms=documents.timing(waited_ms, len(queries), search=milliseconds_since(started)),
    )


@each_alone
def pairs(index: Index, request: PairsRequest, waited_ms: float) -> PairsAnswer:
    """Answer POST /influence/pairs. Raises as `groups`."""
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    asked, train = queries_of(index, request), _training_examples(index, request)
    with named_refusals(index, request, [*train, *asked]):
        queries = _resolved(index, request, asked)
        scores = index.pairs([row.example for row in train], queries, method=request.method, **options_of(request))
    return PairsAnswer(
        **documents.head(index, request),
        queries=[asked_about(index, [own], query.target) for own, query in zip(asked, queries, strict=True)],
        train=[asked_about(index, [row]) for row in train],
        scores=scores.tolist(),
        timing_ms=documents.timing(waited_ms, len(queries), gradient=milliseconds_since(started)),
    )


def _check_column(index: Index, by: str) -> None:
    """Raises FieldError where there is no such column to group by, or reading it would keep others waiting."""
    task, rows = index.task, np.flatnonzero(index.present)
    if by in index.columns:
        return
    check_known("by", by, [*index.columns, *(FEATURE + name for name in feature_names(task, task.train, rows))])
    if len(rows) > READ_ROWS and not in_memory(task, task.train):
        raise FieldError(
            "by",
            f"features of this task are read row by row, of {READ_ROWS:,} rows at most and not of {len(rows):,}: ask "
            "by Index.group_influence in Python",
        )


def _resolved(index: Index, request: GroupsRequest | PairsRequest, asked: Sequence[AskedExample]) -> list[Query]:
    examples = [query.example for query in asked]
    return index.queries(examples, method=request.method, target=target_of(index, request))


def _training_examples(index: Index, request: PairsRequest) -> list[AskedExample]:
    given = parsed_examples(index.task, request.train_examples or [], "train_examples")
    for asked in given:
        try:
            require_labels(index.task, [asked.example])
        except QueryError as error:
            raise FieldError(asked.field, str(error)) from error
    return given + row_examples(index, "train", request.train_rows or [])


def asked_about(index: Index, examples: Sequence[AskedExample], target: str | None = None) -> Asked:
    """One example, or several whose mean is asked about.  target: what is explained of it, in words"""
    first, labels = examples[0], {index.label(asked.example) for asked in examples}
    label = labels.pop() if len(labels) == 1 else None
    row = first.row if len(examples) == 1 else None
    name = index.task.label_name(label)
    return Asked(split=first.split, row=row, label=label, label_name=name, count=len(examples), target=target)


def _group(group: gradtrace.GroupInfluence, classes: Task | None) -> Group:
    """classes: the task that names the groups, where they are classes"""
    return documents.document(Group, group, group_name=_name(group.group, classes))


def _name(group: Label | str | None, classes: Task | None) -> str | None:
    return None if classes is None or isinstance(group, str) else classes.label_name(group)
