"""Shards that are real processes: killed while they are asked, and with whatever opened them; never half an answer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

import shard_questions
import tiny
from conftest import DigitsRun, mostly_long, program, serving_when_ready, wait_until
from gradtrace import CorruptIndexError, Index, open_index
from gradtrace.errors import ShardLostError
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.sharded.opening import open_shards
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.searcher import ShardedSearcher
from gradtrace.store.rows import RowStore
from gradtrace_indexer import delete_rows
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings
from made_index import write_index
from test_damage_while_serving import BODY, Clients, answered, is_right
from test_sharded_search import check_same, random_rows


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[RowShards]:
    opened = open_shards(tmp_path, write_index(tmp_path, random_rows(90)), 3)
    yield opened
    opened.close()


def pids(shards: RowShards) -> list[int]:
    return shards.ask_all(lambda window: shard_questions.pid)


def test_a_killed_shard_is_started_again_and_the_question_repeated(shards: RowShards, tmp_path: Path) -> None:
    whole = ProgressiveSearcher(RowStore(tmp_path, write_index(tmp_path / "copy", random_rows(90))))
    queries = torch.from_numpy(random_rows(90)[:, :5].transpose(1, 0, 2).copy())
    expected = whole.search(queries, [0, 1, 2], 4)
    before = pids(shards)
    for killed in ([1], [0, 2], [0, 1, 2]):
        for number in killed:
            os.kill(pids(shards)[number], signal.SIGKILL)
        for result, one in zip(ShardedSearcher(shards).search(queries, [0, 1, 2], 4), expected, strict=True):
            check_same(result, one)
    assert not {*before} & {*pids(shards)}


def test_one_that_is_killed_while_it_computes_is_asked_again(shards: RowShards) -> None:
    before = pids(shards)
    timer = threading.Timer(0.2, os.kill, (before[1], signal.SIGKILL))
    timer.start()
    assert shards.ask_all(lambda window: shard_questions.sleeps) == [1, 1, 1]
    timer.join()
    after = pids(shards)
    assert [pid for pid in after if pid not in before] == [after[1]]


def test_a_question_that_ends_its_shard_twice_is_an_error_and_others_are_answered(shards: RowShards) -> None:
    for _ in range(2):
        questions = {0: shard_questions.pid, 1: shard_questions.dies, 2: shard_questions.pid}
        with pytest.raises(ShardLostError, match=r"rows 30 to 60 of .* is lost"):
            shards.ask(questions)
        assert len({*pids(shards)}) == 3


def test_what_a_shard_raises_is_raised_and_nothing_is_owed(shards: RowShards) -> None:
    before = pids(shards)
    with pytest.raises(MemoryError, match="too much"):
        shards.ask({0: shard_questions.sleeps, 1: shard_questions.fails, 2: shard_questions.sleeps})
    assert pids(shards) == before


def test_an_interrupted_question_leaves_no_answer_for_the_next(shards: RowShards) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        shards.ask_all(lambda window: shard_questions.sleeps)
    timer.join()
    assert all(psutil.pid_exists(pid) for pid in pids(shards))


def test_a_shard_whose_file_is_damaged_meanwhile_is_lost(tmp_path: Path) -> None:
    manifest = write_index(tmp_path, random_rows(90), shard_rows=45)
    shards = open_shards(tmp_path, manifest, 2)
    for entry in manifest.shards:
        if entry.start == 45:
            os.truncate(tmp_path / entry.rows.path, 100)
    os.kill(pids(shards)[1], signal.SIGKILL)
    with pytest.raises(ShardLostError, match=r"cannot be opened again .* has 100 bytes"):
        pids(shards)
    with pytest.raises(CorruptIndexError, match="has 100 bytes"):
        open_shards(tmp_path, manifest, 2)
    shards.close()


def is_over(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_shards_end_with_their_index(tmp_path: Path) -> None:
    """Whoever lets go of an index has ended its processes, without a collection of garbage."""
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    tiny.build(task, tmp_path)
    gc.collect()
    gc.disable()
    try:
        index: Index | None = open_index(tmp_path / "index", task, shards=2)
        assert index is not None
        assert index.contents.shards is not None
        running = pids(index.contents.shards)
        index.influence(tiny.classes(2, seed=4), include=["percentiles", "layers", "clusters"])
        index.self_influence()
        index = None
        assert all(is_over(pid) for pid in running)
    finally:
        gc.enable()


PROGRAM = """
import sys, time
from pathlib import Path
from gradtrace.sharded.opening import open_shards
from gradtrace.store.manifest_file import read_manifest
import shard_questions
if __name__ == "__main__":
    path = Path(sys.argv[1])
    shards = open_shards(path, read_manifest(path), 2)
    print(*shards.ask_all(lambda window: shard_questions.pid), flush=True)
    if sys.argv[2] == "sleep":
        shards.ask_all(lambda window: shard_questions.sleeps)
        time.sleep(1000)
"""


@pytest.mark.parametrize("end", mostly_long(["exit", "SIGKILL", "SIGTERM", "SIGINT"], "SIGKILL"))
def test_shards_end_with_the_program_that_opened_them(digits_index: DigitsRun, tmp_path: Path, end: str) -> None:
    (tmp_path / "opens.py").write_text(PROGRAM)
    words = [str(tmp_path / "opens.py"), str(digits_index.index), "exit" if end == "exit" else "sleep"]
    folders = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    with program(
        *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": folders}
    ) as process:
        assert process.stdout is not None
        running = [int(pid) for pid in process.stdout.readline().split()]
        assert len(running) == 2
        if end != "exit":
            process.send_signal(signal.Signals[end])
        process.wait(180)
        wait_until(lambda: all(is_over(pid) for pid in running))


def shards_below(process: psutil.Process) -> set[int]:
    """Of a service's workers: they are forked from a process of the worker."""
    below = {each.pid: each.ppid() for each in process.children(recursive=True)}
    workers = {pid for pid, parent in below.items() if below.get(parent) == process.pid}
    return {pid for pid, parent in below.items() if below.get(parent) in workers}


def service(run: DigitsRun, shards: int = 3) -> Hosted:
    return Hosted("digits", run.index, run.task, shards=shards)


def kill_some(times: int) -> None:
    """Of the shards of this process's service, one every time that all are there."""
    draw = np.random.default_rng(0)
    for _ in range(times):
        wait_until(lambda: len(shards_below(psutil.Process())) == 3)
        os.kill(int(draw.choice(sorted(shards_below(psutil.Process())))), signal.SIGKILL)
        time.sleep(0.2)


def test_under_16_clients_a_killed_shard_is_not_noticed(digits_index: DigitsRun) -> None:
    """Each question is repeated to the shard that takes its place: no error, and no answer without its rows."""
    whole = digits_index.open().influence([digits_index.open().task.query[4]], k=20, method="influence")[0]
    with serving_when_ready(create_service([service(digits_index)], Settings())) as url:
        right = answered(httpx.post(f"{url}/influence", json=BODY, timeout=600))
        hits = [(hit.row, hit.score) for hit in [*whole.proponents, *whole.opponents]]
        assert is_right(right, tuple(hits))
        clients = Clients(url, 16)
        try:
            kill_some(8)
        finally:
            answers = clients.end()
        assert [answer for answer in answers if not is_right(answer, right)] == []
        assert sum(answers.values()) > 16


def test_without_its_rows_nothing_is_answered(copied_run: DigitsRun) -> None:
    """A shard that cannot be opened again is told as 503, until its files are back."""
    with serving_when_ready(create_service([service(copied_run)], Settings())) as url:
        assert httpx.post(f"{url}/influence", json=BODY, timeout=600).status_code == 200
        moved = copied_run.index / "rows"
        moved.rename(copied_run.index / "away")
        for pid in shards_below(psutil.Process()):
            os.kill(pid, signal.SIGKILL)
        response = httpx.post(f"{url}/influence", json=BODY, timeout=600)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert response.json()["type"] in (
            "urn:gradtrace:problem:shard-lost",
            "urn:gradtrace:problem:index-unavailable",
        )
        (copied_run.index / "away").rename(moved)
        wait_until(lambda: httpx.post(f"{url}/influence", json=BODY, timeout=600).status_code == 200)


def test_generations_are_swapped_over_all_shards_at_once(copied_run: DigitsRun) -> None:
    """Every answer is that of one generation or of the other; the old shards end."""
    with serving_when_ready(create_service([service(copied_run)], Settings())) as url:
        old, running = httpx.post(f"{url}/influence", json=BODY, timeout=600), shards_below(psutil.Process())
        clients = Clients(url, 4)
        try:
            rows = [hit["row"] for end in ("proponents", "opponents") for hit in old.json()["results"][0][end][:10]]
            delete_rows(copied_run.index, rows)
            wait_until(lambda: all(is_over(pid) for pid in running))
        finally:
            answers = clients.end()
        new = answered(httpx.post(f"{url}/influence", json=BODY, timeout=600))
        assert not {row for row, _ in new} & set(rows)  # type: ignore[misc]
        of_either = [is_right(answer, answered(old)) or is_right(answer, new) for answer in answers]
        assert all(of_either)
        assert len(shards_below(psutil.Process())) == 3


@pytest.mark.long
def test_a_killed_service_leaves_no_shard(digits_index: DigitsRun) -> None:
    words = ["-m", "gradtrace_service", "serve", str(digits_index.index), "--task", digits_index.task, "--port", "0"]
    with program(*words, "--shards", "2", stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(shards_below(psutil.Process(process.pid))) == 2)
        running = shards_below(psutil.Process(process.pid))
        process.kill()
        wait_until(lambda: all(is_over(pid) for pid in running))


@pytest.mark.long
def test_a_shard_that_hangs_is_replaced_with_its_worker(digits_index: DigitsRun) -> None:
    """Its request is told so at the deadline; the next one is answered."""
    with serving_when_ready(create_service([service(digits_index)], Settings(deadline_seconds=5))) as url:
        wait_until(lambda: httpx.post(f"{url}/influence", json=BODY, timeout=600).status_code == 200)
        hanging = min(shards_below(psutil.Process()))
        os.kill(hanging, signal.SIGSTOP)
        assert httpx.post(f"{url}/influence", json=BODY, timeout=600).status_code == 504
        wait_until(lambda: httpx.post(f"{url}/influence", json=BODY, timeout=600).status_code == 200)
        assert is_over(hanging)
