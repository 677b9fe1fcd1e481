"""The answer to POST /influence/removal: what leaving rows out of the training would do to queries."""

from __future__ import annotations

import time

import numpy as np

from gradtrace import Index
from gradtrace.methods import METHODS
from gradtrace_client.removal_schemas import RemovalAnswer, RemovalEffect, mean_of
from gradtrace_client.request_schemas import RemovalRequest
from gradtrace_service.answers import documents
from gradtrace_service.answers.groups_and_pairs import asked_about
from gradtrace_service.answers.questions import check_names, check_rows, options_of, queries_of, target_of
from gradtrace_service.answers.unfit_queries import named_refusals
from gradtrace_service.engine.work import each_alone
from gradtrace_service.ops.timings import milliseconds_since


@each_alone
def removal(index: Index, request: RemovalRequest, waited_ms: float) -> RemovalAnswer:
    """
    Raises:
        FieldError: a field names something that does not exist, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    check_rows(index, "rows", request.rows)
    target = target_of(index, request)
    queries = queries_of(index, request)
    with named_refusals(index, request, queries):
        effects = index.removal(
            request.rows,
            [query.example for query in queries],
            method=request.method,
            **options_of(request),
            target=target,
        )
    results = [
        documents.document(RemovalEffect, effect, query=asked_about(index, [query], effect.target))
        for query, effect in zip(queries, effects, strict=True)
    ]
    head = documents.head(index, request)
    return RemovalAnswer(
        **head | {"convention": f"{head['convention']} {removal_convention(index, request.method)}"},
        rows=len(np.unique(request.rows)),
        results=results,
        mean=mean_of(results),
        timing_ms=documents.timing(waited_ms, len(queries), search=milliseconds_since(started)),
    )


def removal_convention(index: Index, method: str) -> str:
    """What the numbers of this method say of a removal, and what they take for granted."""
    predicted_by, rows = METHODS[method].removal, index.manifest.task.train_rows
    if predicted_by is None:
        return (
            "A removal: `score_sum` above zero says that the rows, taken together, are proponents. It is in no unit of "
            "what is explained: it compares sets of rows with each other in order only, and nothing is predicted."
        )
    return (
        "A removal: `predicted_change` is how much what is explained would rise, in its own unit, if the rows were "
        f"left out of the training (above zero: it would be worse without them): {predicted_by}. It assumes that each "
        "row acts as if by itself, so it fits few of many rows, and that the model was trained as the method describes "
        f"on all {rows:,} rows, those included that were deleted from the index since."
    )
