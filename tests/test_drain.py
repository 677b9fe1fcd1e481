"""Readiness at the beginning and at the end of a service, as `gradtrace serve` runs it: in a process, with signals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from benchmarks.restarts import restart

import digits_task
from conftest import DigitsRun, mostly_long, wait_until
from gradtrace_service import app as app_module
from gradtrace_service import cli
from gradtrace_service.app import create_app, create_service
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.indexes.jobs import JobRunner
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from gradtrace_service.state.database import Database

# Renders at once when it is tried, and when it is let once it is armed.
SLOW_TASK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from digits_task import TASK
render = TASK.render
def slowly(example):
    if not Path({here!r}, "armed").exists():
        return render(example)
    Path({here!r}, "begun").touch()
    while not Path({here!r}, "go on").exists():
        time.sleep(0.05)
    return render(example)
TASK.render = slowly
"""


@pytest.fixture
def slow_task(tmp_path: Path) -> str:
    path = tmp_path / "slow_task.py"
    path.write_text(SLOW_TASK.format(tests=str(Path(digits_task.__file__).parent), here=str(tmp_path)))
    return f"{path}:TASK"


@contextmanager
def served(index: Path, task: str, log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        "serve",
        str(index),
        "--task",
        task,
        "--port",
        str(port),
        "--log-format",
        "json",
        "--drain-seconds",
        "120",
        "--grace-seconds",
        "0",
        *flags,
    ]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradtrace_service", *words], stderr=stderr, start_new_session=True
        )
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def readiness(url: str) -> int | None:
    try:
        return httpx.get(f"{url}/readyz").status_code
    except httpx.TransportError:
        return None


def until(condition: int | None, url: str, seconds: float = 180.0) -> None:
    ends = time.monotonic() + seconds
    while readiness(url) != condition:
        assert time.monotonic() < ends, f"/readyz did not become {condition}"
        time.sleep(0.1)


def first_refusal(url: str, body: dict[str, object]) -> httpx.Response:
    """Until the grace is over, a request is accepted, and waits behind the slow one: it is given up and sent again."""
    for _ in range(60):
        with suppress(httpx.ReadTimeout):
            return httpx.post(f"{url}/influence", json=body, timeout=2)
    raise AssertionError("the service goes on accepting requests")


def ends_when_all_is_answered(process: subprocess.Popen[bytes], url: str, here: Path, sent: Callable[[], None]) -> None:
    body = {"query_rows": [0], "k": 2}
    (here / "armed").touch()
    with ThreadPoolExecutor(1) as other:
        in_flight = other.submit(httpx.post, f"{url}/influence", json=body, timeout=120)
        wait_until(lambda: (here / "begun").exists())
        sent()
        until(503, url)
        refused = first_refusal(url, body)
        assert httpx.get(f"{url}/readyz").json()["type"] == "urn:gradtrace:problem:draining"
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:gradtrace:problem:draining")
        assert "retry-after" in refused.headers
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert not in_flight.done()
        (here / "go on").touch()
        assert in_flight.result().status_code == 200
        assert len(in_flight.result().json()["results"][0]["proponents"]) == 2
    process.wait(30)
    assert readiness(url) is None


def test_sigterm(slow_task: str, digits_index: DigitsRun, tmp_path: Path) -> None:
    with served(digits_index.index, slow_task, tmp_path / "log") as (process, url):
        until(200, url)
        ends_when_all_is_answered(process, url, tmp_path, process.terminate)


@pytest.mark.parametrize("processes", mostly_long(["0", "1"], "1"))
def test_ctrl_c_that_reaches_the_workers_too(
    slow_task: str, digits_index: DigitsRun, tmp_path: Path, processes: str
) -> None:
    with served(digits_index.index, slow_task, tmp_path / "log", "--processes", processes) as (process, url):
        until(200, url)
        ends_when_all_is_answered(process, url, tmp_path, lambda: os.killpg(process.pid, signal.SIGINT))


@pytest.mark.long
def test_a_sigterm_that_reaches_the_workers_too(slow_task: str, digits_index: DigitsRun, tmp_path: Path) -> None:
    with served(digits_index.index, slow_task, tmp_path / "log") as (process, url):
        until(200, url)
        ends_when_all_is_answered(process, url, tmp_path, lambda: os.killpg(process.pid, signal.SIGTERM))


def test_within_the_grace_requests_are_answered(slow_task: str, digits_index: DigitsRun, tmp_path: Path) -> None:
    with served(digits_index.index, slow_task, tmp_path / "log", "--grace-seconds", "600") as (process, url):
        until(200, url)
        process.terminate()
        until(503, url)
        assert httpx.get(f"{url}/readyz").json()["type"] == "urn:gradtrace:problem:draining"
        # From the next of its ticks on, ten a second, the server ends connections.
        wait_until(lambda: httpx.get(f"{url}/healthz").headers.get("connection") == "close")
        answered = httpx.post(f"{url}/influence", json={"query_rows": [0], "k": 2}, timeout=120)
        assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        process.terminate()  # a second signal ends it at once
        process.wait(60)


@pytest.mark.long
def test_restarts_under_clients_fail_no_request(digits_index: DigitsRun) -> None:
    for _ in range(2):
        clients, failed, _ = restart(digits_index.index, digits_index.task, 32, 1.0, "--grace-seconds", "1")
        assert failed == {}
        assert clients.happened["200"]


@pytest.mark.long
def test_an_inherited_socket_is_restarted_without_a_refused_connection(digits_index: DigitsRun, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, ThreadPoolExecutor(2) as other:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        flags = ["--task", digits_index.task, "--fd", str(listener.fileno()), "--grace-seconds", "0"]
        command = [sys.executable, "-m", "gradtrace_service", "serve", str(digits_index.index), *flags]
        for _ in range(2):
            asked = other.submit(httpx.post, f"{url}/influence", json={"query_rows": [0]}, timeout=300)
            process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
            try:
                assert asked.result().status_code == 200
                process.terminate()
                process.wait(120)
            finally:
                process.kill()
                process.wait()


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_index_is_refused_at_once(digits_index: DigitsRun, tmp_path: Path, processes: int) -> None:
    shutil.copy(digits_index.index / "manifest.json", tmp_path)
    with pytest.raises(IndexUnavailableError, match="is missing"):
        create_service([Hosted("index", tmp_path, digits_index.task)], Settings(processes=processes))


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--max-connections", "1000000", "--max-connections 1000000 needs"),
        ("--api-key-file", "{missing}", "cannot be read"),
        ("--audit-log", "{missing}/log", "No such file"),
    ],
)
def test_a_setting_that_is_refused_ends_the_program_before_an_index_is_opened(
    digits_index: DigitsRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    told: str,
) -> None:
    words = ["serve", str(digits_index.index), "--task", "missing.py:TASK", "--port", "0"]
    setting = [flag, value.format(missing=tmp_path / "missing")]
    monkeypatch.setattr(sys, "argv", ["gradtrace", *words, *setting])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("descriptor", mostly_long(["97", "0"], "0"))
def test_a_descriptor_that_is_no_listener_is_told(digits_index: DigitsRun, descriptor: str) -> None:
    words = ["serve", str(digits_index.index), "--task", digits_index.task, "--fd", descriptor]
    with socket.socket() as unbound:
        done = subprocess.run(
            [sys.executable, "-m", "gradtrace_service", *words],
            stdin=unbound,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "systemd passes the first socket" in done.stderr


def test_the_events_of_a_job_do_not_hold_the_end_up(digits_index: DigitsRun, tmp_path: Path) -> None:
    index = Path(shutil.copytree(digits_index.index, tmp_path / "index"))

    async def follow_until_the_end() -> list[str]:
        jobs = JobRunner([Hosted("index", index, digits_index.task)], Database(tmp_path / "state.sqlite"))
        job = await jobs.start(None, roll_back_to=7)

        heard, begun = [], asyncio.Event()

        async def states() -> list[str]:
            async for state in jobs.follow(job.id):
                heard.append(state.state)
                begun.set()
            return heard

        following = asyncio.ensure_future(states())
        await begun.wait()
        await jobs.drain()
        found = await asyncio.wait_for(following, 60)
        await jobs.close()
        return found

    assert set(asyncio.run(follow_until_the_end())) == {"running"}


def test_a_first_query_that_fails_is_tried_again(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app_module, "_TRY_AGAIN_SECONDS", 0.1)
    index = digits_index.open()
    influence = index.influence
    tries: list[object] = []
    monkeypatch.setattr(index, "influence", lambda *examples, **_: tries.append(examples) or 1 / 0)
    with serving(create_app(index)) as url:
        wait_until(lambda: len(tries) >= 3)
        assert readiness(url) == 503
        monkeypatch.setattr(index, "influence", influence)
        until(200, url)
    assert "the first query failed: division by zero" in caplog.text
