"""Tasks that hang, end their process, or leak: their request fails, and no other. Over HTTP, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

import digits_task
from conftest import DigitsRun, mostly_long, serving_when_ready, wait_until
from gradtrace_service.app import create_service
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

# What the task does on an image of one grey.
HANGS, EXITS, INTERRUPTS, ENDS, KILLED, CRASHES, LEAKS = 201, 202, 203, 204, 205, 206, 207
_TASK = """
import ctypes, os, signal, sys, time
sys.path.insert(0, {tests!r})
import numpy as np
from digits_task import TASK

LEAKED = []

def leak():
    LEAKED.append(np.ones(200 << 17))

def hang():
    while True:
        time.sleep(0.1)

DEEDS = {{
    201: hang,
    202: lambda: sys.exit(3),
    203: lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    204: lambda: os._exit(0),
    205: lambda: os.kill(os.getpid(), signal.SIGKILL),
    206: lambda: ctypes.string_at(0),
    207: leak,
}}

class Hostile(type(TASK)):
    def loss(self, model, batch):
        for image in batch[0].flatten(1):
            values = (image * 255).round().unique().tolist()
            if len(values) == 1 and values[0] in DEEDS:
                DEEDS[values[0]]()
        return super().loss(model, batch)

TASK.__class__ = Hostile
"""
GOOD: dict[str, Any] = {"query_rows": [3], "k": 3}


def grey(value: int) -> dict[str, Any]:
    return {"example": {"image": [[value] * 8] * 8, "label": 3}, "k": 3}


@pytest.fixture
def hosted(digits_index: DigitsRun, tmp_path: Path) -> Hosted:
    path = tmp_path / "hostile_task.py"
    path.write_text(_TASK.format(tests=str(Path(digits_task.__file__).parent)))
    return Hosted("digits", digits_index.index, f"{path}:TASK")


@contextmanager
def service(hosted: Hosted, **settings: Any) -> Iterator[tuple[FastAPI, httpx.Client]]:
    app = create_service([hosted], Settings(**settings))
    with serving_when_ready(app) as url, httpx.Client(base_url=url, timeout=600) as http:
        yield app, http


def rows(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [hit["row"] for hit in response.json()["results"][0]["proponents"]]


def ask(http: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return http.post("/influence", json=body)


def ask_in_one_batch(app: FastAPI, http: httpx.Client, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    release, engine = threading.Event(), app.state.engine
    engine.workers[0].thread.submit(release.wait, 120)
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        pool.submit(http.get, "/index")
        wait_until(lambda: engine.computing == 1)
        asked: list[Future[httpx.Response]] = []
        for body in bodies:
            asked.append(pool.submit(ask, http, body))
            wait_until(lambda: engine.waiting == len(asked))
        release.set()
        return [response.result() for response in asked]


def test_a_request_that_hangs_is_given_up_and_its_neighbours_are_answered(
    hosted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    with service(hosted, deadline_seconds=120) as (app, http):
        expected = rows(ask(http, GOOD))
        before = app.state.engine.workers[0].pid
        app.state.engine.settings = Settings(deadline_seconds=40)  # short: the hung one takes half of it
        first, hung, last = ask_in_one_batch(app, http, [GOOD, grey(HANGS), GOOD])
        assert rows(first) == rows(last) == expected
        assert (hung.status_code, hung.json()["type"]) == (504, "urn:gradtrace:problem:deadline")
        assert app.state.engine.workers[0].pid != before
        assert rows(ask(http, GOOD)) == expected
        assert http.get("/readyz").status_code == 200
    told = [record.getMessage() for record in caplog.records if "computes too long" in record.getMessage()]
    assert hung.headers["x-request-id"] in told[-1]  # the last one names it alone
    assert first.headers["x-request-id"] not in told[-1]


@pytest.mark.parametrize("deed", mostly_long([ENDS, KILLED, CRASHES], KILLED))
def test_a_request_that_ends_its_process_fails_alone(hosted: Hosted, deed: int) -> None:
    with service(hosted) as (app, http):
        expected = rows(ask(http, GOOD))
        first, fatal, last = ask_in_one_batch(app, http, [GOOD, grey(deed), GOOD])
        assert rows(first) == rows(last) == expected
        assert (fatal.status_code, fatal.json()["type"]) == (500, "urn:gradtrace:problem:worker-lost")
        assert rows(ask(http, GOOD)) == expected


@pytest.mark.parametrize(
    ("processes", "deed"),
    mostly_long([(0, EXITS), (0, INTERRUPTS), (1, EXITS), (1, INTERRUPTS)], (0, INTERRUPTS), (1, EXITS)),
)
def test_a_task_that_raises_what_ends_programs(hosted: Hosted, processes: int, deed: int) -> None:
    with service(hosted, processes=processes) as (app, http):
        expected = rows(ask(http, GOOD))
        first, fatal, last = ask_in_one_batch(app, http, [GOOD, grey(deed), GOOD])
        assert rows(first) == rows(last) == expected
        assert (fatal.status_code, fatal.json()["type"]) == (500, "urn:gradtrace:problem:failure")


def test_a_worker_that_was_killed_loses_no_request(hosted: Hosted) -> None:
    with service(hosted, processes=2) as (app, http), ThreadPoolExecutor(4) as pool:
        expected = rows(ask(http, GOOD))
        for number in range(6):
            asked = [pool.submit(ask, http, GOOD) for _ in range(4)]
            worker = app.state.engine.workers[number % 2]
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGKILL)
            assert [rows(response.result()) for response in asked] == [expected] * 4


def test_processes_that_were_killed_while_idle_are_no_fault_of_the_next_request(hosted: Hosted) -> None:
    with service(hosted, processes=2) as (app, http):
        expected = rows(ask(http, GOOD))
        for _ in range(3):
            wait_until(lambda: None not in [worker.pid for worker in app.state.engine.workers])
            for worker in app.state.engine.workers:
                process = psutil.Process(worker.pid)
                process.kill()
                process.wait(60)
            assert rows(ask(http, GOOD)) == expected


@pytest.mark.long
def test_a_worker_above_its_memory_limit_is_replaced_between_answers(
    hosted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    with service(hosted, worker_memory_limit_mb=1 << 20) as (app, http):
        expected, worker = rows(ask(http, GOOD)), app.state.engine.workers[0]
        worker.memory_limit = _resident(worker.pid) + (150 << 20)
        for _ in range(3):
            before = worker.pid
            assert ask(http, grey(LEAKS)).status_code == 200  # 200 MB each
            wait_until(lambda before=before: worker.pid not in (None, before))  # type: ignore[misc]
            assert rows(ask(http, GOOD)) == expected
    assert caplog.text.count("more than worker_memory_limit_mb") == 3


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("processes", mostly_long([0, 1], 1))
def test_what_is_nested_too_deeply_is_refused(hosted: Hosted, processes: int) -> None:
    with service(hosted, processes=processes) as (_, http):
        for depth in (100, 300, 400, 600, 900, 1_200, 10_000, 100_000):
            body = b'{"example": {"image": ' + b"[" * depth + b"]" * depth + b"}}"
            response = http.post("/influence", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (400, 422), (depth, response.text)
        assert ask(http, GOOD).status_code == 200


@pytest.mark.parametrize(
    ("processes", "line"),
    mostly_long([(1, "os._exit(0)"), (1, "sys.exit(3)"), (0, "sys.exit(3)")], (1, "os._exit(0)"), (0, "sys.exit(3)")),
)
def test_a_task_that_ends_its_process_when_it_is_loaded(
    digits_index: DigitsRun, tmp_path: Path, processes: int, line: str
) -> None:
    path = tmp_path / "ends.py"
    path.write_text(f"import os, sys\n{line}\n")
    with pytest.raises(IndexUnavailableError, match=r"ended the program|did not start"):
        create_service([Hosted("a", digits_index.index, f"{path}:TASK")], Settings(processes=processes))


@pytest.mark.long
def test_a_thread_that_hangs_ends_the_service(hosted: Hosted, tmp_path: Path) -> None:
    """So that its supervisor starts it again."""
    words = ["serve", str(hosted.path), "--task", hosted.task, "--port", "0", "--processes", "0"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradtrace_service", *words, "--deadline-seconds", "5"], stderr=log, text=True
        )
        try:
            wait_until(lambda: "ready" in (tmp_path / "log").read_text().split())
            address = (tmp_path / "log").read_text().partition("running on ")[2].split()[0]
            with httpx.Client(base_url=address, timeout=60) as http, ThreadPoolExecutor(1) as pool:
                hung = pool.submit(ask, http, grey(HANGS))
                wait_until(lambda: http.get("/readyz").status_code == 503)
                assert http.get("/readyz").json()["type"] == "urn:gradtrace:problem:worker-hung"
                refused = ask(http, GOOD)
                assert (refused.status_code, refused.json()["type"]) == (503, "urn:gradtrace:problem:worker-hung")
                assert refused.headers["retry-after"]
                assert hung.result().status_code == 504
            assert process.wait(120) == 1
        finally:
            process.kill()
            process.wait()


def test_a_thread_that_was_only_slow_goes_on(hosted: Hosted) -> None:
    with service(hosted, processes=0, deadline_seconds=0.5) as (app, http):
        release, engine = threading.Event(), app.state.engine
        engine.workers[0].thread.submit(release.wait, 120)
        assert ask(http, GOOD).status_code == 504
        wait_until(lambda: engine.hung)
        assert http.get("/readyz").status_code == 503
        release.set()
        wait_until(lambda: http.get("/readyz").status_code == 200)
        engine.settings = Settings(deadline_seconds=600)
        assert ask(http, GOOD).status_code == 200
