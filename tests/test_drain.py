"""Readiness at the beginning and at the end of a service, as `gradtrace serve` runs it: in a process, with signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import digits_task
from conftest import DigitsRun
from gradtrace_service import app as app_module
from gradtrace_service.app import create_app
from gradtrace_service.server import serving

SLOW_TASK = f"""
import sys, time
sys.path.insert(0, {str(Path(digits_task.__file__).parent)!r})
from digits_task import TASK
render = TASK.render
def slowly(example):
    time.sleep(0.5)
    return render(example)
TASK.render = slowly
"""


@contextmanager
def served(index: Path, task: str, log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(index), "--task", task, "--port", str(port), "--log-format", "json", *flags]
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


def until(condition: int | None, url: str, seconds: float = 90.0) -> None:
    ends = time.monotonic() + seconds
    while readiness(url) != condition:
        assert time.monotonic() < ends, f"/readyz did not become {condition}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "signals"),
    [
        ((), lambda process: process.terminate()),
        (("--processes", "1"), lambda process: os.killpg(process.pid, signal.SIGINT)),
    ],
    ids=["SIGTERM", "Ctrl-C, processes"],
)
def test_what_was_asked_is_answered_and_nothing_new(flags, signals, digits_index: DigitsRun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    task = tmp_path / "slow_task.py"
    task.write_text(SLOW_TASK)
    body = {"query_rows": [0], "k": 2}
    with (
        served(digits_index.index, f"{task}:TASK", tmp_path / "log", *flags) as (process, url),
        ThreadPoolExecutor(1) as other,
    ):
        until(200, url)
        in_flight = other.submit(httpx.post, f"{url}/influence", json=body, timeout=60)
        time.sleep(0.5)
        signals(process)
        until(503, url, seconds=1.5)
        refused = httpx.post(f"{url}/influence", json=body)
        assert httpx.get(f"{url}/readyz").json()["type"] == "urn:gradtrace:problem:draining"
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:gradtrace:problem:draining")
        assert "retry-after" in refused.headers
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert not in_flight.done()
        assert in_flight.result().status_code == 200
        assert len(in_flight.result().json()["results"][0]["proponents"]) == 2
        process.wait(30)
        assert readiness(url) is None


def test_an_index_that_cannot_be_opened_is_not_ready_and_the_log_says_why(
    digits_index: DigitsRun, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for path in digits_index.index.iterdir():
        (index / path.name).symlink_to(path)
    hidden = next(path for path in index.iterdir() if path.is_symlink() and path.is_dir())
    hidden.rename(tmp_path / hidden.name)
    log = tmp_path / "log"
    with served(index, digits_index.task, log, "--processes", "1") as (_, url):
        until(503, url)
        for _ in range(600):
            if "not ready" in log.read_text():
                break
            time.sleep(0.1)
        assert readiness(url) == 503
        assert httpx.get(f"{url}/healthz").status_code == 200
        (tmp_path / hidden.name).rename(hidden)  # put right under the running service
        until(200, url)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("not ready" in line["message"] and hidden.name in line["message"] for line in lines)


def test_without_processes_it_does_not_start(digits_index: DigitsRun, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    (index / "manifest.json").symlink_to(digits_index.index / "manifest.json")
    with served(index, digits_index.task, tmp_path / "log") as (process, _):
        assert process.wait(60) == 1
    assert (tmp_path / "log").read_text().startswith("error: ")


def test_a_first_query_that_fails_is_tried_again(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app_module, "_TRY_AGAIN_SECONDS", 0.1)
    index = digits_index.open()
    influence = index.influence
    monkeypatch.setattr(index, "influence", lambda *_, **__: 1 / 0)
    with serving(create_app(index)) as url:
        assert readiness(url) == 503
        time.sleep(0.3)
        assert readiness(url) == 503
        monkeypatch.setattr(index, "influence", influence)
        until(200, url, seconds=10)
    assert "the first query failed: division by zero" in caplog.text
