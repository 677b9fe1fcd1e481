"""What updates cost against a full build: `python -m benchmarks.updates mnist`.

Builds at all checkpoints but the last, adds the last, and builds at all of them; then appends, deletes and compacts 1 %
of the rows. Where the training run kept fewer checkpoints than asked for, its last one is repeated under other names:
what an update costs does not depend on the weights. Every figure includes checking the task and opening the result;
shares are of the full build, and the processor's time is the one to look at on a machine that is busy otherwise.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.memory import SomeRows
from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, delete_rows
from gradtrace_indexer.task_loading import load_task


def repeated(checkpoints: list[Checkpoint], count: int, folder: Path) -> list[Checkpoint]:
    """The first `count`, made up to so many by copies of the last."""
    last = checkpoints[-1]
    copies = []
    for number in range(1, count - len(checkpoints) + 1):
        path = folder / f"copy-{number}{last.path.suffix}"
        shutil.copy(last.path, path)
        copies.append(replace(last, path=path, step=last.step + number))
    return [*checkpoints[:count], *copies]


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of the processor's time."""
    started, before = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--scratch", type=Path, help="a directory with room for two indexes; default: the system's")
    arguments = parser.parse_args()
    task = load_task(f"examples/{arguments.dataset}/task.py:TASK")
    rows, count = len(task.train), arguments.checkpoints
    shorter = copy.copy(task)
    shorter.train = SomeRows(task.train, range(rows - rows // 100))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        updated, whole, short = (Path(folder) / name for name in ("updated", "whole", "short"))
        checkpoints = repeated(
            load_checkpoints(arguments.runs / arguments.dataset / "checkpoints"), count, Path(folder)
        )
        size = arguments.dimensions
        # The first build also pays for what PyTorch does once in a process, so that the ones compared do not.
        first = seconds(lambda: build_index(task, checkpoints[:-1], updated, dimensions=size, progress=False))
        added = seconds(lambda: add_checkpoints(updated, task, checkpoints, progress=False))
        shutil.rmtree(updated)
        full = seconds(lambda: build_index(task, checkpoints, whole, dimensions=size, progress=False))
        deleted = seconds(lambda: delete_rows(whole, range(0, rows, 100)))
        compacted = seconds(lambda: compact(whole, progress=False))
        shutil.rmtree(whole)
        build_index(shorter, checkpoints[-1:], short, dimensions=size, progress=False)
        appended = seconds(lambda: append_rows(short, task, progress=False))
    print(f"| {arguments.dataset}: {rows:,} rows, {size:,} dimensions | seconds | share | CPU seconds | share |")
    print("|---|--:|--:|--:|--:|")
    for name, (wall, cpu) in (
        (f"full build, {count} checkpoints", full),
        (f"full build, {count - 1} checkpoints (the first in its process)", first),
        (f"adding the last of {count} checkpoints (1/{count} = {1 / count:.3f})", added),
        ("appending 1 % of the rows at one checkpoint", appended),
        ("deleting 1 % of the rows", deleted),
        ("compacting afterwards (every shard is rewritten)", compacted),
    ):
        print(f"| {name} | {wall:.2f} | {wall / full[0]:.3f} | {cpu:.2f} | {cpu / full[1]:.3f} |")


if __name__ == "__main__":
    main()
