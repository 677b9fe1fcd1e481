"""Workers that are killed, fail or are left alone: the same bytes, or an error that says what went wrong."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
from conftest import mostly_long, wait_until
from gradtrace.errors import LossError, StoreError
from gradtrace_indexer import append_rows, build_index, discard
from gradtrace_indexer.build import completion
from gradtrace_indexer.work.watching import unfinished_lines, unfinished_steps
from shared_work import FailingTask, SharedTask, alone, built, checkpoints, small_steps

assert alone  # a fixture, as the next
assert small_steps
pytestmark = pytest.mark.usefixtures("small_steps")


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "gradtrace_indexer.work" in " ".join(child.cmdline())]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "0.02")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("kills", mostly_long([3, 20], 3))
def test_killed_workers_are_replaced_and_change_nothing(
    alone: dict[str, bytes], tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is killed in the midst of a step, so that a step may have been begun by several."""
    monkeypatch.setenv("SLEEP", "0.02" if kills < 10 else "0.05")
    done, draw = threading.Event(), random.Random(kills)
    killed = list[int]()  # steps that were done when a worker was killed

    def kill() -> None:
        while not done.wait(0.3 * draw.random()) and len(killed) < kills:
            states = unfinished_steps(tmp_path / "index")
            done_steps = sum(state.is_done for state in states)
            holders = [state.holder for state in states if state.holder is not None and not state.holder.is_gone()]
            if holders and (not killed or done_steps != killed[-1]):
                os.kill(draw.choice(holders).pid, signal.SIGKILL)
                killed.append(done_steps)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert built(SharedTask(), tmp_path / "index", workers=2) == alone
    finally:
        done.set()
        killer.join()
    assert len(killed) == kills
    assert not workers_of(psutil.Process())


def abandoned(directory: Path) -> list[psutil.Process]:
    """Workers of a build in `directory/index`, as they were when the process that started them was killed."""
    path = directory / "index"
    script = (
        "from shared_work import *; from gradtrace_indexer import build_index; from pathlib import Path\n"
        f"found = checkpoints(Path({str(directory / 'checkpoints')!r}))\n"
        f"build_index(SharedTask(), found, {str(path)!r}, batch_size=16, workers=2)"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent) as parent:
        wait_until(lambda: any(state.holder for state in unfinished_steps(path)))
        workers = workers_of(psutil.Process(parent.pid))
        parent.kill()
    return workers


@pytest.mark.long
@pytest.mark.usefixtures("slow")
def test_an_abandoned_build_is_finished_by_the_next(alone: dict[str, bytes], tmp_path: Path) -> None:
    workers = abandoned(tmp_path)
    assert len(workers) == 2
    for worker in workers:
        worker.wait(60)  # it ends with the process that started it
    assert list(unfinished_lines(tmp_path / "index"))[-1].endswith("steps are done")
    assert built(SharedTask(), tmp_path / "index") == alone


@pytest.mark.usefixtures("slow")
def test_both_workers_do_steps_and_may_read_by_processes_of_their_own(alone: dict[str, bytes], tmp_path: Path) -> None:
    done, together = threading.Event(), set[int]()

    def watch() -> None:
        while not done.wait(0.02):
            holders = [state.holder for state in unfinished_steps(tmp_path / "index") if state.holder is not None]
            together.update(holder.pid for holder in holders)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        assert built(SharedTask(), tmp_path / "index", workers=2, num_workers=1) == alone
    finally:
        done.set()
        watching.join()
    assert len(together) == 2


@pytest.mark.long
@pytest.mark.usefixtures("slow")
def test_a_build_of_other_arguments_takes_nothing_of_one_that_was_given_up_in_its_fit(tmp_path: Path) -> None:
    for worker in abandoned(tmp_path):
        worker.wait(60)
    if (tmp_path / "index" / "pending.json").exists():  # it was faster than the kill
        discard(tmp_path / "index")
    whole = built(SharedTask(), tmp_path / "alone", seed=1)
    assert built(SharedTask(), tmp_path / "index", seed=1, workers=2) == whole


@pytest.mark.long
def test_an_append_that_was_left_goes_on_by_workers_when_the_data_has_grown_again(tmp_path: Path) -> None:
    found, path = checkpoints(tmp_path / "checkpoints"), tmp_path / "index"
    build_index(SharedTask(100), found, path, batch_size=16, progress=False)
    shutil.copytree(path, tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "publish", left)
        with pytest.raises(KeyboardInterrupt):
            append_rows(path, SharedTask(150), batch_size=16, progress=False)
    append_rows(path, SharedTask(), batch_size=16, progress=False, workers=2)
    for rows in (150, 200):
        append_rows(tmp_path / "alone", SharedTask(rows), batch_size=16, progress=False)
    assert tiny.files(path) == tiny.files(tmp_path / "alone")


def left(directory: Path, manifest: Any) -> None:
    raise KeyboardInterrupt


class EndingTask(SharedTask):
    """Ends the program in a worker."""

    def model(self) -> Any:
        if "gradtrace_indexer.work" in " ".join(psutil.Process().cmdline()):
            sys.exit("no more")
        return super().model()


class LongErrorTask(SharedTask):
    """Fails with a text that is longer than a pipe holds."""

    def loss(self, model: Any, batch: Any) -> Any:
        raise LossError("too long " * 20_000)


@pytest.mark.parametrize(("task", "words"), [(EndingTask, "SystemExit: no more"), (LongErrorTask, "too long too long")])
def test_whatever_ends_a_worker_is_told(tmp_path: Path, task: type[SharedTask], words: str) -> None:
    with pytest.raises((RuntimeError, LossError), match=words):
        built(task(), tmp_path / "index", workers=2)


def test_what_a_worker_finds_wrong_is_raised(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"row\(s\) 150"):
        built(FailingTask(), tmp_path / "index", workers=2)
    discard(tmp_path / "index")
    assert tiny.files(tmp_path / "index") == {}


def test_a_task_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    task, found = SharedTask(), checkpoints(tmp_path / "checkpoints")
    task.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="cannot be sent to worker processes"):
        build_index(task, found, tmp_path / "index", workers=2, progress=False)
    build_index(task, found, tmp_path / "index", workers=2, load=SharedTask, progress=False)  # made there instead
