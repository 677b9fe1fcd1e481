"""How fast an index answers on this machine, and its approximate searcher's recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.results.hits import InfluenceResult
from gradtrace.task import Example, Task
from gradtrace_indexer.held_out import held_out
from gradtrace_indexer.searchers.build import recall_of

BATCHES = (1, 8, 64)
_SCANNED = 3  # queries whose scores on all rows are taken, for comparison


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
    yield from _lines("progressive", exact, examples, wanted, k)
    if approximate is not None:
        yield from _lines(approximate.name, index, examples, wanted, k)
    spent = _milliseconds(lambda: exact.scores(examples[:_SCANNED])) / len(examples[:_SCANNED])
    yield f"| all scores | 1 | | {spent:.2f} | | {1e3 / spent:,.1f} | 100 % | | |"


def _lines(
    name: str, index: Index, examples: Sequence[Example], wanted: Sequence[InfluenceResult], k: int
) -> Iterator[str]:
    """One line for each size of a call."""
    results = index.influence(examples, k=k)
    recall = recall_of(wanted, results)
    read = np.mean([result.rows_touched / max(1, result.rows_searched) for result in results])
    for batch in (size for size in BATCHES if size <= len(examples)):
        calls = [examples[start : start + batch] for start in range(0, len(examples) - batch + 1, batch)]
        spent, timings = [], []
        for call in calls:
            started = time.perf_counter()
            timing = index.influence(call, k=k).timing
            spent.append(1e3 * (time.perf_counter() - started))
            timings.append([timing[stage] for stage in ("gradient", "search", "rest")])
        medians = " | ".join(f"{median:.2f}" for median in np.median(timings, axis=0))
        rate = 1e3 * batch / float(np.median(spent))
        yield f"| {name} | {batch} | {medians} | {rate:,.1f} | {read:.1%} | {recall.top:.3f} | {recall.bottom:.3f} |"


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)
