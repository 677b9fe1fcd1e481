"""Every command that writes an index, ended by SIGKILL at random file operations.

    python -m benchmarks.kill_operations --kills 500

Commands change a small index. Each run is in a process of its own, which kills itself just before its n-th file is
opened for writing, renamed or removed, or folder made; n is drawn anew for each kill. Afterwards the index must open as
the generation before or as the one after, whole, with all rows, and answer as that generation does. Then the command is
run again, each third time after what was left was discarded: every file must have the bytes of an undisturbed run.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.kill_resume import finish, must_equal, process
from gradtrace import Checkpoint, Task, open_index
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    build_index,
    compact,
    delete_rows,
    discard,
    fit_representer,
    prune,
    roll_back,
    set_searcher,
    verify,
)
from gradtrace_indexer.build import begin

_ROWS, _MORE, _FEATURES, _CLASSES, _SHARD_ROWS = 60, 20, 5, 3, 32
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Answers = tuple[NDArray[np.float32], NDArray[np.bool_]]  # scores of all rows, and which are present


class SmallTask(Task):
    """A network of 39 weights on random rows of three classes."""

    def __init__(self, rows: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.train = [(torch.randn(_FEATURES, generator=draw), row % _CLASSES) for row in range(rows)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(_FEATURES, 4), nn.Tanh(), nn.Linear(4, _CLASSES))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits


SHORT, LONG = SmallTask(_ROWS), SmallTask(_ROWS + _MORE)


def checkpoints(path: Path, count: int) -> list[Checkpoint]:
    """The first ones beside an index, written where they are missing."""
    folder = path.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    listed = [Checkpoint(folder / f"{step}.safetensors", step, 0.1) for step in range(1, count + 1)]
    for checkpoint in listed:
        if not checkpoint.path.exists():
            draw = torch.Generator().manual_seed(checkpoint.step)
            state = SHORT.model().state_dict()
            save_file({name: torch.randn(each.shape, generator=draw) for name, each in state.items()}, checkpoint.path)
    return listed


def built(path: Path) -> None:
    build_index(SHORT, checkpoints(path, 2), path, dimensions=24, progress=False)


def changed(path: Path) -> None:
    """Of several generations, with deleted rows and all that is derived from rows."""
    built(path)
    delete_rows(path, range(0, 40, 3))
    fit_representer(path)
    add_kernels(path, progress=False)


def added(path: Path) -> None:
    add_checkpoints(path, SHORT, checkpoints(path, 3), progress=False)


def begun(path: Path) -> None:
    """With an unfinished update."""
    changed(path)
    ended_at(50, lambda: append_rows(path, LONG, progress=False), path)
    assert (path / PENDING_NAME).exists()


@dataclass(frozen=True)
class Command:
    """`prepare` makes the index that `run` changes; None: it starts from nothing.

    repeatable: run again after it was published, it changes nothing
    """

    prepare: Callable[[Path], object] | None
    run: Callable[[Path], object]
    repeatable: bool = True


COMMANDS = {
    "build": Command(None, built),
    "append": Command(changed, lambda path: append_rows(path, LONG, progress=False)),
    "add checkpoints": Command(changed, added),
    "delete": Command(changed, lambda path: delete_rows(path, [1, 4])),
    "compact": Command(changed, lambda path: compact(path, progress=False)),
    "prune": Command(changed, prune),
    "discard": Command(begun, discard),
    "roll back": Command(changed, lambda path: roll_back(path, 1), repeatable=False),
    "kernels": Command(built, lambda path: add_kernels(path, progress=False)),
    "searcher": Command(changed, lambda path: set_searcher(path, SHORT, "faiss:Flat", progress=False)),
    "representer": Command(built, fit_representer, repeatable=False),
}


def ended_at(number: int, action: Callable[[], object], directory: Path) -> bool:
    """Run in a process that kills itself before its n-th file operation in the directory; whether it came to that."""
    pid = process(lambda: counting(action, directory, number))
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise SystemExit("a process that was not killed failed")
    return False


def counting(action: Callable[[], object], directory: Path, last: int | None = None) -> int:
    """The number of file operations of an action; the process is killed before the one of number `last`."""
    count, inside = 0, str(directory)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if not (writes or event in ("os.rename", "os.remove", "os.mkdir")) or not str(arguments[0]).startswith(inside):
            return
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    action()
    return count


def operations(action: Callable[[], object], directory: Path) -> int:
    """How many file operations an action has, when it is not disturbed; it is run in a process of its own."""
    ours, theirs = os.pipe()
    finish(process(lambda: os.write(theirs, str(counting(action, directory)).encode())))
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        return int(pipe.read())


def answers(path: Path) -> Answers:
    rows = read_manifest(path).task.train_rows
    index = open_index(path, SHORT if rows == _ROWS else LONG)
    return index.scores(SHORT.train[:3]), index.present


class Trial:
    """One command, once undisturbed and then killed again and again."""

    def __init__(self, name: str, command: Command, home: Path) -> None:
        self.name, self.command, self.home = name, command, home
        self.left: Counter[str] = Counter()
        self.expected: dict[int, Answers] = {}
        base = self.place("base")
        if command.prepare is not None:
            finish(process(lambda: self.made(base)))
            self.expected[read_manifest(base).generation] = answers(base)
        whole = self.restored("whole")
        self.operations = operations(lambda: command.run(whole), whole)
        self.expected[read_manifest(whole).generation] = answers(whole)

    def place(self, name: str) -> Path:
        return self.home / name / "index"

    def made(self, path: Path) -> None:
        path.parent.mkdir(parents=True)
        assert self.command.prepare is not None
        self.command.prepare(path)

    def restored(self, name: str) -> Path:
        """A copy of what the command starts from."""
        path = self.place(name)
        shutil.rmtree(path.parent, ignore_errors=True)
        if self.command.prepare is not None:
            shutil.copytree(self.place("base").parent, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints(path, 3)
        return path

    def kill(self, number: int, give_up: bool) -> None:
        """Kill before the n-th operation, look at what is left, then run it again or give it up."""
        path = self.restored("broken")
        if not ended_at(number, lambda: self.command.run(path), path):
            raise SystemExit(f"{self.name} has no file operation {number}")
        published = self.looked_at(path)
        if give_up and self.command.prepare is not None:
            finish(process(lambda: discard(path)))
            self.looked_at(path)
        if published and not self.command.repeatable:
            return
        finish(process(lambda: self.command.run(path)))
        must_equal(self.place("whole"), path)

    def looked_at(self, path: Path) -> bool:
        """Whether the new generation was published; ends the program if what is there is not whole."""
        if not (path / MANIFEST_NAME).exists():
            self.left["nothing yet" if not (path / PENDING_NAME).exists() else "unfinished"] += 1
            if self.command.prepare is not None:
                raise SystemExit(f"{self.name}: the index is gone")
            return False
        generation = read_manifest(path).generation
        if problems := verify(path, all_generations=True, progress=False):
            raise SystemExit(f"{self.name}: {'; '.join(problems)}")
        (scores, present), (expected, expected_present) = answers(path), self.expected[generation]
        if not np.array_equal(present, expected_present) or not np.allclose(scores, expected, rtol=1e-5, atol=1e-7):
            raise SystemExit(f"{self.name}: a wrong answer of generation {generation}")
        published = generation == max(self.expected) and (len(self.expected) > 1 or self.command.prepare is None)
        self.left["the one after" if published else "the one before"] += 1
        return published


def drawn(draw: random.Random, operations: int) -> int:
    """The number of one of the operations; every second time, of the last ones, which publish a generation."""
    return draw.randint(max(1, operations - 5) if draw.random() < 0.5 else 1, operations)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="in all, shared between the commands")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw, kills = random.Random(options.seed), 0
    logging.disable(logging.WARNING)  # of the methods that an update drops
    begin._SHARD_ROWS = _SHARD_ROWS  # type: ignore[attr-defined]
    print("| command | file operations | kills | left, each time whole |\n|---|--:|--:|---|", flush=True)
    with tempfile.TemporaryDirectory() as home:
        for position, (name, command) in enumerate(COMMANDS.items()):
            trial = Trial(name, command, Path(home).resolve() / str(position))
            count = (options.kills * (position + 1)) // len(COMMANDS) - (options.kills * position) // len(COMMANDS)
            for number in range(count):
                trial.kill(drawn(draw, trial.operations), give_up=number % 3 == 2)
            kills += count
            left = ", ".join(f"{times} x {state}" for state, times in trial.left.items())
            print(f"| {name} | {trial.operations} | {count} | {left} |", flush=True)
    print(f"\n{kills} kills: every index opened, no row lost, no wrong answer, every command ended in the same bytes")


if __name__ == "__main__":
    main()
