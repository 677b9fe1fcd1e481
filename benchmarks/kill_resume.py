"""Builds and updates ended by SIGKILL at random moments, then resumed, while a reader asks all the time.

    python -m benchmarks.kill_resume mnist --operation append --kills 10

Every run is in a process of its own. One is left alone; another is killed again and again, and goes on where it stood;
at the end every file of the two must have the same bytes. All the while a further process opens the index anew and
asks it: each answer must be that of a whole generation, the one before or the one after.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.memory import SomeRows
from gradtrace import Index, open_index
from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.errors import MismatchError, StoreError
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME
from gradtrace.store.manifest_file import read_generation, read_manifest
from gradtrace.task import Task
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, delete_rows
from gradtrace_indexer.build import begin
from gradtrace_indexer.task_loading import load_task

_POLL = 0.002
_QUERIES = 3
_EARLY = "before the first commit"

Action = Callable[[], object]
Answers = tuple[list[list[int]], list[list[float]], int]  # rows of both ends, their scores, and rows searched


@dataclass(frozen=True)
class Subject:
    """What is built or updated, over all training rows (`task`) or the first of them (`shorter`)."""

    task: Task
    shorter: Task
    checkpoints: Sequence[Checkpoint]
    dimensions: int

    def build(self, task: Task, checkpoints: Sequence[Checkpoint], path: Path) -> None:
        build_index(task, checkpoints, path, dimensions=self.dimensions, progress=False)

    def open(self, path: Path) -> Index:
        """As whatever task the current generation is of."""
        grown = read_manifest(path).task.train_rows == len(self.task.train)
        return open_index(path, self.task if grown else self.shorter)


@dataclass(frozen=True)
class Operation:
    """`prepare` makes the index that `run` changes; None: it starts from nothing."""

    prepare: Callable[[Subject, Path], object] | None
    run: Callable[[Subject, Path], object]


def _built(subject: Subject, path: Path) -> None:
    subject.build(subject.task, subject.checkpoints, path)


def _deleted(subject: Subject, path: Path) -> None:
    _built(subject, path)
    delete_rows(path, range(0, len(subject.task.train), 3))


OPERATIONS = {
    "build": Operation(None, _built),
    "add": Operation(
        lambda subject, path: subject.build(subject.task, subject.checkpoints[:-1], path),
        lambda subject, path: add_checkpoints(path, subject.task, subject.checkpoints, progress=False),
    ),
    "append": Operation(
        lambda subject, path: subject.build(subject.shorter, subject.checkpoints, path),
        lambda subject, path: append_rows(path, subject.task, progress=False),
    ),
    "delete": Operation(_built, lambda subject, path: delete_rows(path, range(0, len(subject.task.train), 3))),
    "compact": Operation(_deleted, lambda subject, path: compact(path, progress=False)),
}


@dataclass(frozen=True)
class Killed:
    """What a killed process left."""

    seconds: float
    stage: str
    shards: int


def process(action: Action) -> int:
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
        raise SystemExit("a process that was not killed failed")


def pending_shards(directory: Path) -> int | None:
    """Shards that the unfinished generation has; None where there is none."""
    try:
        return len(read_generation(directory, PENDING_NAME).shards)
    except StoreError:
        return None


def undisturbed(action: Action, directory: Path) -> tuple[float, float]:
    """Seconds until the new generation was begun, and until the end."""
    started = time.perf_counter()
    pid, begun = process(action), 0.0
    while running(pid):
        if not begun and (directory / PENDING_NAME).exists():
            begun = time.perf_counter() - started
        time.sleep(_POLL)
    finish(pid)
    return begun, time.perf_counter() - started


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def killed(action: Action, directory: Path, seconds: float, in_shard: bool) -> Killed | None:
    """Start a process and kill it after so many seconds, or when next in a shard; None if it was done before."""
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
    done = pending_shards(directory)
    inside = list(directory.rglob("*.tmp"))
    stage = _EARLY if done is None else "inside a shard" if inside else "between shards"
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


def answers(index: Index) -> Answers:
    found = index.influence([index.task.train[row] for row in range(_QUERIES)], k=10)
    hits = [[*one.proponents, *one.opponents] for one in found]
    return (
        [[hit.row for hit in one] for one in hits],
        [[hit.score for hit in one] for one in hits],
        found[0].rows_searched,
    )


@contextmanager
def reader(subject: Subject, path: Path, expected: dict[int, Answers], seen: Counter[int]) -> Iterator[None]:
    """A process that opens the index anew and asks it, all the time; `seen` counts answers by generation.

    Ends the program if an answer was not the expected one of its generation, or an open failed.
    """
    ours, theirs = os.pipe()
    stop = path.with_name(path.name + "-read")
    stop.unlink(missing_ok=True)

    def read() -> None:
        while not stop.exists():
            generation = read_once(subject, path, expected)
            os.write(theirs, bytes([generation]))

    pid = process(read)
    os.close(theirs)
    try:
        yield
    finally:
        stop.touch()
        with os.fdopen(ours, "rb") as pipe:
            seen.update(pipe.read())
        _, status = os.waitpid(pid, 0)
        stop.unlink()
    if status:
        raise SystemExit("the reader failed, see above")


def read_once(subject: Subject, path: Path, expected: dict[int, Answers]) -> int:
    """The generation that was asked, 0 where there is none yet."""
    if list(expected) == [1] and not (path / MANIFEST_NAME).exists():  # a first build, not yet published
        time.sleep(_POLL)
        return 0
    before = read_manifest(path).generation
    try:
        index = subject.open(path)
    except MismatchError:
        if read_manifest(path).generation != before:  # published between the choice of the task and the open
            return 0
        raise
    generation = index.manifest.generation
    (rows, scores, searched), found = expected[generation], answers(index)
    if rows != found[0] or searched != found[2] or not np.allclose(scores, found[1], rtol=1e-5, atol=1e-7):
        raise SystemExit(f"a wrong answer of generation {generation}: {found}, not {expected[generation]}")
    return generation


class Trial:
    """One operation, once undisturbed and once killed again and again."""

    def __init__(self, subject: Subject, operation: Operation, run: Path) -> None:
        self.subject, self.operation = subject, operation
        self.base, self.whole, self.broken = (run / f"kill-{name}" for name in ("base", "undisturbed", "resumed"))
        self.expected: dict[int, Answers] = {}
        self.seen: Counter[int] = Counter()
        self.remove()

    def remove(self) -> None:
        for directory in (self.base, self.whole, self.broken):
            shutil.rmtree(directory, ignore_errors=True)

    def restore(self, directory: Path) -> None:
        """To where the operation starts from."""
        shutil.rmtree(directory, ignore_errors=True)
        if self.base.exists():
            shutil.copytree(self.base, directory)

    def action(self, directory: Path) -> Action:
        return lambda: self.operation.run(self.subject, directory)

    def learn(self, directory: Path) -> None:
        """The right answers of an index's current generation."""
        index = self.subject.open(directory)
        self.expected[index.manifest.generation] = answers(index)

    def prepare(self) -> tuple[float, float]:
        """Run undisturbed; seconds until the new generation was begun, and until the end."""
        prepare = self.operation.prepare
        if prepare is not None:
            finish(process(lambda: prepare(self.subject, self.base)))
            self.learn(self.base)
        self.restore(self.whole)
        times = undisturbed(self.action(self.whole), self.whole)
        self.learn(self.whole)
        self.restore(self.broken)
        return times

    def kill(self, kills: int, begun: float, total: float, moments: random.Random) -> None:
        """Kill so often, starting anew where it was faster; then let it finish, and compare every file."""
        number, fits, fit, shards = 0, max(1, kills // 4) if begun else 0, begun, begun < total and begun > 0
        while number < kills:
            if number < fits:
                seconds = moments.uniform(0.05, 0.9 if self.base.exists() else 0.6) * fit
            else:  # what comes before the first commit has to be done again
                seconds = moments.uniform(0, 2) * (total - begun) / max(1, kills - number)
                seconds += begun if pending_shards(self.broken) is None else 0
            in_shard = shards and number >= fits and number % 2 == 1
            with reader(self.subject, self.broken, self.expected, self.seen):
                found = killed(self.action(self.broken), self.broken, seconds, in_shard)
            if found is None or (number < fits and found.stage != _EARLY):  # it was faster: on with another one
                if found is None:
                    must_equal(self.whole, self.broken)
                fit, total = fit * 0.7, begun + (total - begun) * 0.9
                self.restore(self.broken)
                continue
            number += 1
            print(f"| {number} | {found.seconds:.2f} s | {found.stage} | {found.shards} |", flush=True)
        with reader(self.subject, self.broken, self.expected, self.seen):
            finish(process(self.action(self.broken)))
        must_equal(self.whole, self.broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", choices=DATASETS)
    parser.add_argument("--operation", choices=list(OPERATIONS), default="build")
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
    shorter = copy.copy(task)
    shorter.train = SomeRows(task.train, range(len(task.train) * 2 // 3))
    checkpoints = load_checkpoints(arguments.checkpoints or run / "checkpoints")
    begin._SHARD_ROWS = arguments.shard_rows  # type: ignore[attr-defined]
    subject = Subject(task, shorter, checkpoints, arguments.dimensions)
    trial = Trial(subject, OPERATIONS[arguments.operation], run)
    begun, total = trial.prepare()
    print(f"{arguments.operation}, undisturbed: begun after {begun:.1f} s, done after {total:.1f} s\n")
    print("| kill | after | found | shards committed |\n|--:|--:|---|--:|")
    trial.kill(arguments.kills, begun, total, random.Random(arguments.seed))
    files = sum(path.is_file() for path in trial.whole.rglob("*"))
    seen = ", ".join(f"{count} of generation {number}" for number, count in sorted(trial.seen.items()) if number)
    print(f"\nresumed and finished: all {files} files have the bytes of the undisturbed {arguments.operation}")
    print(f"read all the while, every answer right: {seen or 'none'}")
    trial.remove()


if __name__ == "__main__":
    main()
