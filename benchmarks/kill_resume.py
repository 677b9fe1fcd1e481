"""Builds ended by SIGKILL at random moments, then resumed: `python -m benchmarks.kill_resume mnist --kills 10`.

Every build runs in a process of its own. One is left alone; another is killed again and again, and goes on where it
stood; at the end every file of the two must have the same bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.datasets import DATASETS, task_spec
from gradtrace.checkpoints import load_checkpoints
from gradtrace.errors import StoreError
from gradtrace.manifest import read_manifest
from gradtrace_indexer import build, build_index
from gradtrace_indexer.task_loading import load_task

_POLL = 0.002


@dataclass(frozen=True)
class Killed:
    """What a killed build left."""

    seconds: float
    stage: str
    shards: int


def process(action: Callable[[], object]) -> int:
    """Run in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finish(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit("a build that was not killed failed")


def shards(directory: Path) -> int | None:
    """Shards that are committed; None before the basis is."""
    try:
        return len(read_manifest(directory).shards)
    except StoreError:
        return None


def undisturbed(action: Callable[[], object], directory: Path) -> tuple[float, float]:
    """Seconds until the basis was committed, and until the end."""
    started = time.perf_counter()
    pid, fitted = process(action), 0.0
    while running(pid):
        if not fitted and (directory / "manifest.json").exists():
            fitted = time.perf_counter() - started
        time.sleep(_POLL)
    finish(pid)
    return fitted, time.perf_counter() - started


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def killed(action: Callable[[], object], directory: Path, seconds: float, in_shard: bool) -> Killed | None:
    """Start a build and kill it after so many seconds, or when next in a shard; None if it was done before."""
    started = time.perf_counter()
    pid = process(action)
    time.sleep(seconds)
    if in_shard:
        stop_in_shard(pid, directory)
    seconds = time.perf_counter() - started
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        return None
    done = shards(directory)
    unfinished = list(directory.rglob("*.tmp"))
    stage = "fitting" if done is None else "inside a shard" if unfinished else "between shards"
    return Killed(seconds, stage, done or 0)


def stop_in_shard(pid: int, directory: Path) -> None:
    """Stop the process while it writes a shard, if it still comes to one: a stopped one cannot get past it."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        state = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if state is None or state.si_code != os.CLD_STOPPED or list(directory.glob("rows/*/*.tmp")):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(_POLL)


def must_equal(a: Path, b: Path) -> None:
    """End the program if some file is not in both directories with the same bytes."""
    names = {path.relative_to(root) for root in (a, b) for path in root.rglob("*") if path.is_file()}
    wrong = [
        name
        for name in sorted(names)
        if not ((a / name).is_file() and (b / name).is_file() and (a / name).read_bytes() == (b / name).read_bytes())
    ]
    if wrong:
        raise SystemExit(f"files differ: {', '.join(map(str, wrong))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", choices=DATASETS)
    parser.add_argument("--task", help="another task, with --checkpoints")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shard-rows", type=int, default=4096, help="smaller than usual, so that many are done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if (arguments.dataset is None) == (arguments.task is None or arguments.checkpoints is None):
        parser.error("name a data set, or --task and --checkpoints")
    run: Path = arguments.runs / (arguments.dataset or "")
    task = load_task(arguments.task or task_spec(arguments.dataset))
    checkpoints = load_checkpoints(arguments.checkpoints or run / "checkpoints")
    whole, broken = run / "kill-undisturbed", run / "kill-resumed"
    for directory in (whole, broken):
        shutil.rmtree(directory, ignore_errors=True)
    build._SHARD_ROWS = arguments.shard_rows  # type: ignore[attr-defined]

    def builds(directory: Path) -> Callable[[], object]:
        return lambda: build_index(task, checkpoints, directory, dimensions=arguments.dimensions, progress=False)

    fitted, total = undisturbed(builds(whole), whole)
    print(f"undisturbed: basis after {fitted:.1f} s, all {shards(whole)} shards after {total:.1f} s\n")
    print("| kill | after | found | shards committed |\n|--:|--:|---|--:|")
    moments = random.Random(arguments.seed)
    number, fits, fit = 0, max(1, arguments.kills // 4), fitted
    while number < arguments.kills:
        if number < fits:
            seconds = moments.uniform(0.05, 0.6) * fit
        else:  # a fit that was killed has to be done again
            seconds = moments.uniform(0, 2) * (total - fitted) / (arguments.kills - number)
            seconds += fitted if shards(broken) is None else 0
        found = killed(builds(broken), broken, seconds, in_shard=number >= fits and number % 2 == 1)
        if found is None or (number < fits and found.stage != "fitting"):  # it was faster: on with another one
            if found is None:
                must_equal(whole, broken)
            fit *= 0.7
            shutil.rmtree(broken)
            continue
        number += 1
        print(f"| {number} | {found.seconds:.2f} s | {found.stage} | {found.shards} |", flush=True)
    finish(process(builds(broken)))
    must_equal(whole, broken)
    files = sum(path.is_file() for path in whole.rglob("*"))
    print(f"\nresumed and finished: all {files} files have the bytes of the undisturbed build")
    for directory in (whole, broken):
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
