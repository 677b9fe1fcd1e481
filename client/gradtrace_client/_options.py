"""The options that calls share, as types of their `**options`: each is spelled once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from gradtrace_client.browse_requests import RowOrder
from gradtrace_client.request_schemas import (
    Aggregate,
    Include,
    Order,
    Prefilter,
    RowFilter,
    Similarity,
    Target,
    Weights,
)


class QuestionOptions(TypedDict, total=False):
    """Which index answers, and how it computes scores. Each option may be left out.

    index: Name of the index, one of `client.indexes()`. Default: the first.
    method: Attribution method, one of `client.index().methods`. Default: `tracin`.
    checkpoints: Names of the checkpoints that are used. Default: all or, for some methods, the last
        of each run.
    weights: Weight of each checkpoint in the sum over checkpoints. `learning_rate`; `learning_rate_steps`, the sum of
        the learning rates of all steps since the checkpoint before; or `equal`. Default: the method's own.
    damping: Added to the eigenvalues of the curvature before they are inverted, as a multiple of the mean
        eigenvalue; greater than 0. For `influence`, by default 1.
    segments: Number of segments of the training, each with one curvature and one gradient. For `source`.
    similarity: How representations are compared: `cosine` (default), `dot` or `l2`. For `repsim`.
    """

    index: str | None
    method: str
    checkpoints: Sequence[str] | None
    weights: Weights | None
    damping: float | None
    segments: int | None
    similarity: Similarity | None


class InfluenceOptions(QuestionOptions, total=False):
    """The options of `influence`: the `QuestionOptions`, and those below. Each may be left out.

    filter: Which training rows are searched, as a `RowFilter` or a dict of its fields. Default: all.
    target: `loss` explains the loss even if the task defines another measurement; `{"label": "dog"}` the loss at that
        label; `{"label": "dog", "rather_than": "cat"}` the difference: proponents push towards the first.
    rescore: Recompute the full gradients of twice as many rows as asked for at either end, and order them by their
        exact scores. Default: False.
    prefilter: Rescore the rows that are most alike by `bm25` or `repsim`, in place of those that the search finds.
    candidates: How many rows a prefilter gives. Default: 100.
    include: What hits carry: `parts`, the score by checkpoint; `layers`, the score by layer; `percentiles`, the score's
        place among those of all rows; `clusters`, which of them are near-duplicates; `examples`, the rendered example.
        What results carry: `histogram`, that of the scores of all rows; `probabilities`, those of the query's classes.
        Default: `parts` and `examples`.
    """

    filter: RowFilter | Mapping[str, Any] | None
    target: Target | Mapping[str, Any] | None
    rescore: bool
    prefilter: Prefilter | None
    candidates: int
    include: Iterable[Include]


class PairsOptions(QuestionOptions, total=False):
    """The options of `pairs`: the `QuestionOptions`, and those below. Each may be left out.

    examples: Several queries in the task's own form.
    query_rows: Queries, as rows of the task's query data set.
    target: As in `InfluenceOptions`.
    """

    examples: Sequence[Mapping[str, Any]] | None
    query_rows: Sequence[int] | None
    target: Target | Mapping[str, Any] | None


class GroupsOptions(PairsOptions, total=False):
    """The options of `groups`: the `PairsOptions`, and those below. Each may be left out.

    train_rows: Queries, as rows of the training data set.
    filter: Which training rows are summed, as a `RowFilter` or a dict of its fields. Default: all.
    aggregate: `mean` gives one result, whose sums are of the mean scores over the queries.
    """

    train_rows: Sequence[int] | None
    filter: RowFilter | Mapping[str, Any] | None
    aggregate: Aggregate | None


class RemovalOptions(PairsOptions, total=False):
    """The options of `removal`: the `PairsOptions`, of which `method` is `influence` by default, and those below.

    train_rows: Queries, as rows of the training data set.
    """

    train_rows: Sequence[int] | None


class TokensOptions(QuestionOptions, total=False):
    """The options of `tokens`: the `QuestionOptions`, and those below. Each may be left out.

    query_rows: The query, as a row of the task's query data set, in a list.
    train_rows: The query, as a row of the training data set, in a list.
    target: As in `InfluenceOptions`.
    """

    query_rows: Sequence[int] | None
    train_rows: Sequence[int] | None
    target: Target | Mapping[str, Any] | None


class SelfInfluenceOptions(QuestionOptions, total=False):
    """The options of `self_influence`: the `QuestionOptions`, and those below. Each may be left out.

    order: `descending` (default) starts with the largest score, `ascending` with the smallest.
    labels: Only rows with one of these labels.
    examples: Whether the answer carries the rendered examples. Default: True.
    """

    order: Order
    labels: Sequence[int | float] | None
    examples: bool


class ExamplesOptions(TypedDict, total=False):
    """The options of `list_examples`: conditions that rows must meet, and how they are shown. Each may be left out.

    index: Name of the index, one of `client.indexes()`. Default: the first.
    labels, predictions: Only rows with one of these labels, or predictions; classes also by their names.
    correct: Only rows that the last checkpoint predicts correctly (True) or wrongly (False).
    min_loss, max_loss: Only rows whose loss lies between these, both inclusive.
    text: Only rows whose rendering contains each of these words, in upper or lower case.
    rows: Only these rows.
    order: `row` (default), `-row`, `loss` or `-loss`, which begins with the largest.
    render: Whether the answer carries the rendered examples. Default: True.
    """

    index: str | None
    labels: Sequence[int | float | str] | None
    predictions: Sequence[int | float | str] | None
    correct: bool | None
    min_loss: float | None
    max_loss: float | None
    text: str | None
    rows: Sequence[int] | None
    order: RowOrder
    render: bool
