"""What is asked: the target with labels as numbers, and what is explained of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from gradtrace.contents import IndexContents
from gradtrace.errors import GradtraceError, QueryError
from gradtrace.methods.method import Method
from gradtrace.models.queries import QUERY_BATCH, Query, is_one_example, resolve_queries
from gradtrace.models.targets import Target, TargetLabels, check_replaceable, target_labels
from gradtrace.task import Example


def checked_target(
    contents: IndexContents, method: Method, target: Target | None
) -> Literal["loss"] | TargetLabels | None:
    """What is explained, with labels as numbers.

    Raises:
        QueryError: there is no such target, or this task or method has none that names labels.
    """
    if isinstance(target, Mapping):
        if not method.uses_labels:
            raise QueryError(f"method {method.name!r} compares {method.compares}, whatever the label: leave target out")
        labels = target_labels(target, contents.task, contents.classes)
        check_replaceable(contents.task, contents.first_row, labels)
        return labels
    if target not in (None, "loss"):
        raise QueryError(f'unknown target {target!r}; leave it out, or pass "loss" or {{"label": ...}}')
    return target


def asked_queries(
    contents: IndexContents, method: Method, examples: Sequence[Example], target: Target | None
) -> list[Query]:
    """What is explained of each example; queries stay as they are.

    Raises:
        QueryError: as `checked_target` or `resolve_queries`, or an example is a contrast, which this method has not.
    """
    if not len(examples):
        raise QueryError("no example to explain")
    queries = _resolved(contents, method, examples, target)
    if not method.compares_gradients and any(query.is_contrast and not query.target_labels for query in queries):
        raise QueryError(f"method {method.name!r} compares {method.compares}, not two losses: leave rather_than out")
    return queries


def _resolved(
    contents: IndexContents, method: Method, examples: Sequence[Example], target: Target | None
) -> list[Query]:
    if all(isinstance(example, Query) for example in examples):
        return list(examples)
    last, checked = contents.last_model, checked_target(contents, method, target)
    try:
        batches = (examples[start : start + QUERY_BATCH] for start in range(0, len(examples), QUERY_BATCH))
        return [query for batch in batches for query in resolve_queries(last, batch, checked)]
    except GradtraceError:
        raise
    except Exception as error:
        if is_one_example(examples, contents.first_row):
            raise QueryError("this is one example where a list of examples is asked for: pass [example]") from error
        raise
