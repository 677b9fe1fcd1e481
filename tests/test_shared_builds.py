"""Builds and updates whose work several workers share: the same bytes, whoever did what, and whoever was killed."""

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
from conftest import DigitsRun, mostly_long, wait_until
from gradtrace import open_index
from gradtrace.errors import LossError, StoreError
from gradtrace_indexer import add_checkpoints, append_rows, build_index, discard
from gradtrace_indexer.build import completion
from gradtrace_indexer.work import claims
from gradtrace_indexer.work.claims import Claims
from gradtrace_indexer.work.sharing import Rank, rank_of
from gradtrace_indexer.work.watching import unfinished_lines, unfinished_steps
from shared_work import BadRowsTask, FailingTask, SharedTask, checkpoints, small_steps

assert small_steps  # a fixture
pytestmark = pytest.mark.usefixtures("small_steps")

GRADTRACE = Path(sys.executable).with_name("gradtrace")
WAYS: dict[str, dict[str, Any]] = {
    "two processes": {"workers": 2},
    "four processes": {"workers": 4},
    "a rank alone": {"rank": Rank(1, 4)},
    "two actors of Ray": {"ray": "local", "workers": 2},
}


def built(task: SharedTask, path: Path, **options: Any) -> dict[str, bytes]:
    """The files of an index, whose checkpoints lie beside it."""
    build_index(task, checkpoints(path.parent / "checkpoints"), path, progress=False, **{"batch_size": 16, **options})
    return tiny.files(path)


@pytest.fixture(scope="module")
def alone(small_steps: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return built(SharedTask(), tmp_path_factory.mktemp("alone") / "index")


@pytest.mark.parametrize("way", mostly_long(WAYS, "two processes", "two actors of Ray"))
def test_the_bytes_are_the_same_whoever_builds(alone: dict[str, bytes], tmp_path: Path, way: str) -> None:
    assert built(SharedTask(), tmp_path / "index", **WAYS[way]) == alone


def test_ranks_one_after_another(alone: dict[str, bytes], tmp_path: Path) -> None:
    for number in (2, 0, 3, 1):
        assert built(SharedTask(), tmp_path / "index", rank=Rank(number, 4)) == alone


@pytest.mark.parametrize("options", mostly_long(
    [{"basis": "spectral"}, {"basis": "gaussian", "precision": "int4"}, {"rows": "sparse", "dimensions": 6}],
    {"rows": "sparse", "dimensions": 6},
), ids=lambda options: "-".join(map(str, options.values())))  # fmt: skip
def test_other_kinds_of_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = built(SharedTask(), tmp_path / "alone", **options)
    assert built(SharedTask(), tmp_path / "shared", workers=2, **options) == whole


def test_the_command_line_shares_work(digits_index: DigitsRun, tmp_path: Path, small_steps: None) -> None:
    for name, words in (("alone", []), ("shared", ["--workers", "2"])):
        command = ["build", digits_index.task, "--checkpoints", str(digits_index.checkpoints), "--dimensions", "32"]
        subprocess.run([GRADTRACE, *command, "--out", str(tmp_path / name), *words], check=True)
    assert tiny.files(tmp_path / "shared") == tiny.files(tmp_path / "alone")
    told = subprocess.run([GRADTRACE, "info", str(tmp_path / "alone"), "--tasks"], capture_output=True, check=True)
    assert b"no shared build or update is unfinished" in told.stdout


def test_bad_rows_are_the_same_whoever_finds_them(tmp_path: Path) -> None:
    whole = built(BadRowsTask(), tmp_path / "alone", skip_bad_rows=True)
    assert built(BadRowsTask(), tmp_path / "shared", skip_bad_rows=True, workers=2) == whole
    index = open_index(tmp_path / "alone", BadRowsTask())
    assert (
        {5, 7, 48, 89} <= set(index.manifest.skipped) <= {row for row in range(200) if row % 41 == 7 or row % 37 == 5}
    )


def test_updates_are_shared(tmp_path: Path) -> None:
    for name, workers in (("alone", 1), ("shared", 2)):
        path, found = tmp_path / name, checkpoints(tmp_path / "checkpoints")
        build_index(SharedTask(130), found[:2], path, batch_size=16, progress=False)
        append_rows(path, SharedTask(), batch_size=16, progress=False, workers=workers)
        add_checkpoints(path, SharedTask(), found, batch_size=16, progress=False, workers=workers)
    assert tiny.files(tmp_path / "shared") == tiny.files(tmp_path / "alone")


# What may go wrong


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "gradtrace_indexer.work" in " ".join(child.cmdline())]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "0.05")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("kills", mostly_long([3, 20], 3))
def test_killed_workers_are_replaced_and_change_nothing(alone: dict[str, bytes], tmp_path: Path, kills: int) -> None:
    """Each is killed in the midst of a step, so that a step may have been begun by several."""
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


@pytest.mark.usefixtures("slow")
def test_a_build_of_other_arguments_takes_nothing_of_one_that_was_given_up_in_its_fit(tmp_path: Path) -> None:
    for worker in abandoned(tmp_path):
        worker.wait(60)
    if (tmp_path / "index" / "pending.json").exists():  # it was faster than the kill
        discard(tmp_path / "index")
    whole = built(SharedTask(), tmp_path / "alone", seed=1)
    assert built(SharedTask(), tmp_path / "index", seed=1, workers=2) == whole


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


# Ranks


@pytest.mark.parametrize("environment", [
    {"RANK": "3", "WORLD_SIZE": "8"},
    {"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "8"},
    {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"},
], ids=lambda names: next(iter(names)))  # fmt: skip
def test_the_scheduler_says_which_rank_it_is(environment: dict[str, str]) -> None:
    assert rank_of("env", None, environment) == Rank(3, 8)


@pytest.mark.parametrize(("number", "world"), [("4", 4), ("1", None), ("-1", 4), ("one", 4), ("env", None)])
def test_a_rank_that_cannot_be(number: str, world: int | None) -> None:
    with pytest.raises(StoreError, match="--rank"):
        rank_of(number, world, {})


# Claims


def test_a_claim_is_held_by_one(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "claims", "a"), Claims(tmp_path / "claims", "b")
    with first.claimed("x") as held:
        assert held is not None
        held.advance(5)
        with second.claimed("x") as refused, second.claimed("y") as other:
            assert refused is None
            assert other is not None
            assert {step: holder.worker for step, holder in first.holders().items()} == {"x": "a", "y": "b"}
        wait_until(lambda: first.holders()["x"].units == 5)
        assert not second.is_abandoned("x")
    assert second.is_abandoned("x")
    assert list((tmp_path / "claims").iterdir()) == []


def test_many_processes_claim_and_none_holds_what_another_does(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from gradtrace_indexer.work.claims import Claims\n"
        "claims, seen = Claims(Path(sys.argv[1])), Path(sys.argv[2])\n"
        "for _ in range(60):\n"
        "    with claims.claimed('x') as held:\n"
        "        if held is not None:\n"
        "            seen.touch(exist_ok=False); time.sleep(.002); seen.unlink()\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "claims"), str(tmp_path / "seen")]
    processes = [subprocess.Popen(words) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]


def test_the_claim_of_a_process_that_was_killed_is_taken_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from gradtrace_indexer.work.claims import Claims\n"
        "with Claims(Path(sys.argv[1])).claimed('x'): time.sleep(600)"
    )
    others = Claims(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as process:
        wait_until(lambda: "x" in others.holders())
        assert not others.is_abandoned("x")
        process.kill()
    with others.claimed("x") as held:
        assert held is not None


def test_a_claim_of_another_machine_is_taken_when_its_lease_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_machine", lambda: "there")
    there = Claims(tmp_path, "there").claimed("x")
    theirs = there.__enter__()
    assert theirs is not None
    monkeypatch.setattr(claims, "_machine", lambda: "here")
    here = Claims(tmp_path, "here")
    assert not here.is_abandoned("x")
    theirs._ended.set()  # as if that machine had stopped
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    wait_until(lambda: here.is_abandoned("x"))
    with here.claimed("x") as held:
        assert held is not None
        there.__exit__(None, None, None)  # it goes on, and leaves alone what is another's now
        assert here.holders()["x"].worker == "here"


def test_a_claim_whose_content_was_lost_is_taken_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.claim").write_bytes(b"")
    here = Claims(tmp_path)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)

    def taken() -> bool:
        with here.claimed("x") as held:
            return held is not None

    assert not taken()
    wait_until(taken)
