"""How well an index's methods predict the effect of retraining, and how fast an index answers on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.errors import EvaluationError, GradtraceError
from gradtrace.evaluation import linear_datamodeling_score
from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.results.hits import InfluenceResult
from gradtrace.task import Example, Task
from gradtrace_indexer.evaluation.ground_truth import SubsetOutputs
from gradtrace_indexer.held_out import held_out
from gradtrace_indexer.searchers import recall_of

_TIMED = 5  # queries asked one by one
_BATCHES = (1, 8, 64)
_SCORED = 3  # queries whose scores on all rows are taken, for comparison


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
    yield "| method | LDS | 95 % interval | ms a query |\n|---|--:|---|--:|"
    for method in methods:
        yield f"| {method} | {measured(index, examples, truth, method)} |"


def measured(index: Index, examples: Sequence[Example], truth: SubsetOutputs, method: str) -> str:
    """The cells after a method's name: score, interval, median time of a query."""
    try:
        scores = np.asarray(index.scores(examples, method=method)[:, index.present])
        score = linear_datamodeling_score(scores, truth.subsets[:, index.present], truth.means)
        spent = [_timed(index, [example], method=method)[0] for example in examples[: _TIMED + 1]]
    except GradtraceError as error:
        return f"| {error} |"
    median = np.median(spent[1:])  # the first call only warms up
    return f"{score.mean:.3f} | {score.low:.3f} to {score.high:.3f} | {median:.1f}"


def bench(path: str | Path, task: Task, *, k: int = 10, queries: int = 64, device: str = "auto") -> Iterator[str]:
    """A Markdown table, line by line: medians over calls of `Index.influence` with 1, 8 and 64 held-out queries each.

    An index with an approximate searcher is measured with that and with exact search; the last line is the time of
    scoring every row for one query (`Index.scores`).

    Raises:
        StoreError, CheckpointError: as `open_index`.
    """
    index = open_index(path, task, device=device)
    approximate = index.manifest.searcher
    if approximate is not None and index.manifest.searcher_is_stale():
        yield f"searcher {approximate.name} is of earlier rows and not in use: exact search alone is measured\n"
        approximate = None
    exact = index if approximate is None else open_index(path, task, device=device, searcher="progressive")
    split, examples = held_out(task, queries, index.present)
    yield f"{len(examples)} {split} rows, k = {k}; times in milliseconds\n"
    yield "| searcher | queries a call | gradient | search | rest | queries/s | rows read | recall: top | bottom |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    wanted = exact.influence(examples, k=k)  # warms up as well
    yield from _bench_lines("progressive", exact, examples, wanted, k)
    if approximate is not None:
        yield from _bench_lines(approximate.name, index, examples, wanted, k)
    started = time.perf_counter()
    exact.scores(examples[:_SCORED])
    spent = 1e3 * (time.perf_counter() - started) / len(examples[:_SCORED])
    yield f"| all scores | 1 | | {spent:.2f} | | {1e3 / spent:,.1f} | 100 % | | |"


def _bench_lines(
    name: str, index: Index, examples: Sequence[Example], wanted: Sequence[InfluenceResult], k: int
) -> Iterator[str]:
    """One line for each size of a call."""
    results = index.influence(examples, k=k)
    recall = recall_of(wanted, results)
    read = np.mean([result.rows_touched / max(1, result.rows_searched) for result in results])
    for batch in (size for size in _BATCHES if size <= len(examples)):
        calls = [examples[start : start + batch] for start in range(0, len(examples) - batch + 1, batch)]
        spent, stages = zip(*(_timed(index, call, k=k) for call in calls), strict=True)
        columns = ([timing[stage] for timing in stages] for stage in ("gradient", "search", "rest"))
        medians = " | ".join(f"{np.median(column):.2f}" for column in columns)
        rate = 1e3 * batch / float(np.median(spent))
        yield f"| {name} | {batch} | {medians} | {rate:,.1f} | {read:.1%} | {recall.top:.3f} | {recall.bottom:.3f} |"


def _timed(index: Index, examples: Sequence[Example], **options: Any) -> tuple[float, dict[str, float]]:
    """Milliseconds of a call of `Index.influence`: by the clock, and by stage as it reports them."""
    started = time.perf_counter()
    timing = index.influence(examples, **options).timing
    return 1e3 * (time.perf_counter() - started), timing
