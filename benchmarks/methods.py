"""How long one query takes by each method: `python -m benchmarks.methods cifar10 --index DIR [DIR ...]`.

In this process, an example of the query split at a time, in turns: each example is asked of every method before the
next. Of several indexes of the data, a method is asked of the first that answers by it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from gradtrace import open_index
from gradtrace.data.dataset import fetch
from gradtrace.task import Example
from gradtrace_indexer.task_loading import load_task

Ask = Callable[[Sequence[Example]], object]


def seconds(ask: Ask, example: Example) -> tuple[float, float]:
    """On the clock, and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    ask([example])
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, nargs="+", required=True)
    parser.add_argument("--queries", type=int, default=50)
    arguments = parser.parse_args()
    task = load_task(task_spec(arguments.dataset))
    indexes = [open_index(path, task) for path in arguments.index]
    asks: dict[str, Ask] = {}
    for index in indexes:
        for method in index.methods:
            asks.setdefault(method, partial(index.influence, k=10, method=method))
    rows = np.random.default_rng(0).choice(len(task.query), arguments.queries + 1, replace=False)
    warm_up, *examples = fetch(task.query, rows.tolist())
    for ask in asks.values():
        ask([warm_up])
    times = np.array([[seconds(ask, example) for ask in asks.values()] for example in examples])
    medians = dict(zip(asks, 1e3 * np.median(times, axis=0), strict=True))
    print(
        f"| {arguments.dataset}: {len(examples)} queries | median, ms | of the processor, ms | beside tracin |\n"
        "|---|--:|--:|--:|"
    )
    for method, (clock, processor) in medians.items():
        print(f"| `{method}` | {clock:.1f} | {processor:.1f} | {processor / medians['tracin'][1]:.2f} |")


if __name__ == "__main__":
    main()
