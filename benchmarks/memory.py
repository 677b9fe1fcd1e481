"""Peak memory of a build as rows grow: `python -m benchmarks.memory cifar10 --rows 10000 20000 40000`.

Every build runs in a process of its own, over rows drawn at random (CIFAR-10 is sorted by class). Reading the data may
take more than building, and so hide what the build takes: on Linux the second figure leaves it out.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from gradtrace.checkpoints import load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace.task import Example
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task


class SomeRows:
    """Some rows of a data set in the given order, still read in batches."""

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        return self.dataset[self.rows[row]]

    def __getitems__(self, rows: Sequence[int]) -> list[Example]:
        return fetch(self.dataset, [self.rows[row] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 20_000, 40_000])
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--all-checkpoints", action="store_true", help="default: the last one alone")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--measure", type=int, metavar="ROWS", help="build over so many rows in this process")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(*measure(arguments))
        return
    number = "all checkpoints" if arguments.all_checkpoints else "one checkpoint"
    print(f"| {arguments.dataset}, {number}, {arguments.dimensions} dimensions | peak, MB | peak since data, MB |")
    print("|---|--:|--:|")
    for rows in [0, *arguments.rows]:
        # What the parent holds when it starts a process counts as that one's: so it must not read the data itself.
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--measure", str(rows)]
        whole, since = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        name = f"build over {rows:,} rows" if rows else "imports and data alone"
        print(f"| {name} | {whole} | {since} |", flush=True)


def measure(arguments: argparse.Namespace) -> tuple[str, str]:
    """Megabytes: the peak of this process since its start, and since the data was read."""
    task = load_task(task_spec(arguments.dataset))
    checkpoints = load_checkpoints(arguments.runs / arguments.dataset / "checkpoints")
    order = np.random.default_rng(0).permutation(len(task.train))
    if not 0 <= arguments.measure <= len(order):
        sys.exit(f"--rows {arguments.measure}: {arguments.dataset} has {len(order)} training rows")
    before = peak()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    if arguments.measure:
        task.train = SomeRows(task.train, order[: arguments.measure].tolist())
        chosen = checkpoints if arguments.all_checkpoints else checkpoints[-1:]
        with tempfile.TemporaryDirectory() as folder:
            build_index(task, chosen, Path(folder) / "index", dimensions=arguments.dimensions, progress=False)
    return f"{max(before, peak()):,.0f}", f"{peak():,.0f}"


def peak() -> float:
    """Resident memory of this process at its largest, MB."""
    if sys.platform == "linux":  # where getrusage also counts what the parent held when it started this process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


if __name__ == "__main__":
    main()
