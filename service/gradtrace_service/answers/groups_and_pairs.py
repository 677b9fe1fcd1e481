"""Answers about groups of training rows, and about training examples that are given with the request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import gradtrace
from gradtrace import Index, QueryError, Task
from gradtrace.models.queries import joined_targets, require_labels
from gradtrace_client.group_and_pair_schemas import Asked, Group, GroupInfluence, GroupsAnswer, PairsAnswer
from gradtrace_client.request_schemas import GroupsRequest, PairsRequest
from gradtrace_service.answers import documents
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
    check_known("by", request.by, index.columns)
    target = target_of(index, request)
    queries = queries_of(index, request)
    with named_refusals(index, request, queries):
        influences = index.group_influence(
            [query.example for query in queries],
            by=request.by,
            method=request.method,
            **options_of(request),
            filter=row_filter_of(request),
            target=target,
            aggregate=request.aggregate,
        )
        targets = _targets(index, request, queries)
    asked = [queries] if request.aggregate else [[query] for query in queries]
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
    target = target_of(index, request)
    queries, train = queries_of(index, request), _training_examples(index, request)
    with named_refusals(index, request, [*train, *queries]):
        scores = index.pairs(
            [row.example for row in train],
            [query.example for query in queries],
            method=request.method,
            **options_of(request),
            target=target,
        )
        targets = _targets(index, request, queries)
    return PairsAnswer(
        **documents.head(index, request),
        queries=[asked_about(index, [query], words) for query, words in zip(queries, targets, strict=True)],
        train=[asked_about(index, [row]) for row in train],
        scores=scores.tolist(),
        timing_ms=documents.timing(waited_ms, len(queries), gradient=milliseconds_since(started)),
    )


def _targets(index: Index, request: GroupsRequest | PairsRequest, queries: Sequence[AskedExample]) -> list[str]:
    """What is explained of each query, in words."""
    examples = [query.example for query in queries]
    return index.targets(examples, method=request.method, target=target_of(index, request))


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
    return documents.document(Group, group, group_name=None if classes is None else classes.label_name(group.group))
