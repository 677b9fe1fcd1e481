"""How well an index's methods predict the effect of retraining."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from gradtrace.errors import EvaluationError, GradtraceError
from gradtrace.evaluation import LinearDatamodelingScore, linear_datamodeling_score
from gradtrace.index import Index
from gradtrace.task import Example
from gradtrace_indexer.evaluation.ground_truth import SubsetOutputs

TABLE_HEAD = "| method | LDS | 95 % interval | ms a query |\n|---|--:|---|--:|"
_TIMED = 5  # queries asked one by one


def evaluate(index: Index, examples: Sequence[Example], truth: SubsetOutputs, methods: Sequence[str]) -> Iterator[str]:
    """A Markdown table, line by line, of each method's linear datamodeling score and median time for a query.

    Args:
        examples: those on which the trainings of `truth` were measured (`Retrainings.examples`).
        methods: where one fails, its line gives the reason.

    Raises:
        EvaluationError: trainings of `truth` used rows that are deleted from the index, which has no scores of them.
    """
    if truth.subsets[:, ~index.present].any():
        raise EvaluationError(
            "the models were trained on rows too that are deleted from the index: draw the subsets from the others, "
            "subset_outputs(..., among=np.flatnonzero(index.present))"
        )
    yield TABLE_HEAD
    for method in methods:
        yield f"| {method} | {measured(index, examples, truth, method)} |"


def measured(index: Index, examples: Sequence[Example], truth: SubsetOutputs, method: str) -> str:
    """The cells after a method's name: score, interval, time."""
    try:
        scores = np.asarray(index.scores(examples, method=method)[:, index.present])
        score = linear_datamodeling_score(scores, truth.subsets[:, index.present], truth.means)
        return f"{cells(score)} | {milliseconds(index, examples, method):.1f}"
    except GradtraceError as error:
        return f"| {error} |"


def cells(score: LinearDatamodelingScore) -> str:
    return f"{score.mean:.3f} | {score.low:.3f} to {score.high:.3f}"


def milliseconds(index: Index, examples: Sequence[Example], method: str) -> float:
    """Median time of `Index.influence` for one query. The first call only warms up."""
    spent = []
    for example in examples[: _TIMED + 1]:
        started = time.perf_counter()
        index.influence([example], method=method)
        spent.append(1e3 * (time.perf_counter() - started))
    return float(np.median(spent[1:]))
