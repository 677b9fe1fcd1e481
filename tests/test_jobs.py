"""Indexes that change while the service answers: jobs, generations, several indexes. All over real HTTP."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from conftest import DigitsRun, mostly_long, wait_until
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client import Client
from gradtrace_client.service_schemas import Job
from gradtrace_indexer.work.watching import unfinished_steps
from gradtrace_indexer.writing.files import sole_writer
from gradtrace_service.app import create_service
from gradtrace_service.indexes import jobs as jobs_module
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from gradtrace_service.state import database as database_module


@pytest.fixture
def run(growing_run: DigitsRun) -> DigitsRun:
    return growing_run


@pytest.fixture
def url(run: DigitsRun) -> Iterator[str]:
    with serving(create_service([Hosted("index", run.index, run.task)], Settings(processes=0))) as address:
        yield address


def ended(url: str, job: Job) -> Job:
    """Follow a job's events to the last."""
    with httpx.stream("GET", f"{url}/jobs/{job.id}/events", timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    states = [Job.model_validate_json(event) for event in events]
    assert [state.state for state in states[:-1]] == ["running"] * (len(states) - 1)
    assert states[-1] == Job.model_validate_json(httpx.get(f"{url}/jobs/{job.id}").content)
    return states[-1]


def begin(url: str, **fields: object) -> Job:
    response = httpx.post(f"{url}/reindex", json=fields)
    assert response.status_code == 202, response.text
    job = Job.model_validate_json(response.content)
    assert response.headers["location"] == f"/jobs/{job.id}"
    return job


def generation_served(client: Client, wanted: int) -> None:
    wait_until(lambda: client.index().generation == wanted)


def test_a_new_checkpoint_is_indexed_and_served_and_rolled_back_without_a_failed_request(
    run: DigitsRun, url: str
) -> None:
    stop, failures, generations = threading.Event(), [], set()

    def ask() -> None:
        with Client(url, retries=0) as client:
            while not stop.is_set():
                time.sleep(0.02)  # else the job waits for the processor
                try:
                    answer = client.influence(query_rows=[0], k=3)
                    parts = answer.results[0].proponents[0].parts or {}
                    assert set(parts) == {checkpoint.name for checkpoint in answer.index.checkpoints}
                    generations.add(answer.index.generation)
                except Exception as error:
                    failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    with Client(url) as client:
        job = ended(url, begin(url))
        assert (job.state, job.generation, job.progress) == ("succeeded", 2, 1.0), job.error
        generation_served(client, 2)
        assert len(client.index().checkpoints) == 3
        back = ended(url, begin(url, roll_back_to=1))
        assert (back.state, back.generation) == ("succeeded", 3), back.error
        generation_served(client, 3)
        assert len(client.index().checkpoints) == 2
    stop.set()
    asking.join()
    assert not failures
    assert generations == {1, 2, 3}


def test_several_processes_share_a_job(run: DigitsRun) -> None:
    service = create_service([Hosted("index", run.index, run.task)], Settings(processes=0, job_workers=2))
    with serving(service) as url:
        job = begin(url)
        wait_until(lambda: len(unfinished_steps(run.index)) > 0 or read_manifest(run.index).generation == 2)
        assert ended(url, job).state == "succeeded"
    assert read_manifest(run.index).generation == 2
    assert not (run.index / "unfinished").exists()


def test_a_killed_job_resumes(run: DigitsRun, url: str) -> None:
    job = begin(url)
    assert begin(url).id == job.id  # an index has one writer
    other = httpx.post(f"{url}/reindex", json={"roll_back_to": 1})
    assert (other.status_code, job.id in other.text) == (409, True)
    killed = 0
    while killed < 2:
        for process in gradtrace_processes(run.index):
            os.kill(process, signal.SIGKILL)
            killed += 1
        time.sleep(0.3)
        if Job.model_validate_json(httpx.get(f"{url}/jobs/{job.id}").content).state != "running":
            break
    last = ended(url, job)
    assert (last.state, last.generation) == ("succeeded", 2), last.error
    assert last.attempts == killed + 1
    assert killed


def gradtrace_processes(index: Path) -> list[int]:
    """Of this index's jobs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"gradtrace_service" in words and str(index).encode() in words:
                found.append(int(entry.name))
    return found


def test_a_failing_job_says_why(run: DigitsRun, url: str) -> None:
    last = ended(url, begin(url, roll_back_to=7))
    assert last.state == "failed"
    assert "keeps no generation 7" in str(last.error)
    assert read_manifest(run.index).generation == 1
    assert httpx.get(f"{url}/jobs/none").status_code == 404
    assert httpx.get(f"{url}/jobs/none/events").status_code == 404
    assert httpx.post(f"{url}/reindex", json={"index": "other"}).status_code == 422


def test_a_full_disk_fails_the_job_and_the_next_one_goes_on(
    run: DigitsRun, url: str, largest_file: Callable[[int], None]
) -> None:
    with Client(url) as client:
        before = client.influence(query_rows=[0]).results
        largest_file(3000)
        last = ended(url, begin(url))
        largest_file(resource.RLIM_INFINITY)
        assert last.state == "failed"
        assert "could not be written" in str(last.error)
        assert "free some space" in str(last.error)
        assert client.influence(query_rows=[0]).results == before
        again = ended(url, begin(url))
        assert (again.state, again.generation) == ("succeeded", 2), again.error
        generation_served(client, 2)


def test_jobs_whose_process_cannot_be_started_fail_and_are_forgotten_after_some(
    run: DigitsRun, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(jobs_module, "_KEPT_JOBS", 2)
    jobs = [ended(url, begin(url)) for _ in range(3)]
    assert {(job.state, "No such file" in str(job.error)) for job in jobs} == {("failed", True)}
    kept = [job.id for job in jobs[1:]]
    wait_until(lambda: [job["id"] for job in httpx.get(f"{url}/jobs").json()["jobs"]] == kept[::-1])
    with closing(sqlite3.connect(run.index.with_name("index.state.sqlite"))) as state:
        query = "SELECT id FROM jobs ORDER BY number"
        wait_until(lambda: [job for (job,) in state.execute(query)] == kept)


@pytest.mark.long
def test_a_job_waits_for_another_writer(
    run: DigitsRun, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs_module, "_LOCKED_SECONDS", 0.2)
    with sole_writer(run.index):
        job = begin(url)
        wait_until(lambda: f"ended with {os.EX_TEMPFAIL}" in caplog.text)
        assert Job.model_validate_json(httpx.get(f"{url}/jobs/{job.id}").content).state == "running"
    last = ended(url, job)
    assert (last.state, last.attempts) == ("succeeded", 1), last.error


@pytest.mark.parametrize("ending", mostly_long(["kill -KILL $$", "exit 137"], "kill -KILL $$"))
def test_a_job_that_is_killed_again_and_again_says_that_memory_may_lack(
    run: DigitsRun, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho 'Rows: 3 %' >&2\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    last = ended(url, begin(url))
    assert (last.state, last.attempts, last.ended is not None) == ("failed", 5, True)
    assert "was killed, perhaps by the system for lack of memory" in str(last.error)
    assert "more memory" in str(last.error)


def test_a_job_yields_the_processors_to_answers(
    run: DigitsRun, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    wanted, program = min(before + 10, 19), tmp_path / "python"
    program.write_text(f"#!/bin/sh\nuntil test $(nice) = {wanted}; do sleep 0.05; done\necho nice enough >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    last = ended(url, begin(url))
    assert (last.state, last.error) == ("failed", "nice enough")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_job_ends_also_where_the_service_fails_on_it(
    run: DigitsRun, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs_module, "_lost_methods", lambda *_: {}["a defect"])
    last = ended(url, begin(url))
    assert (last.state, last.error, last.ended is not None) == ("failed", "KeyError; the service's log says why", True)
    assert "a defect" in caplog.text


def test_a_slow_disk_keeps_nobody_waiting(run: DigitsRun, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_WAIT_SECONDS", 120)
    with closing(sqlite3.connect(run.index.with_name("index.state.sqlite"))) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN EXCLUSIVE")
        starting = pool.submit(begin, url)
        wait_until(lambda: len(httpx.get(f"{url}/jobs", timeout=60).json()["jobs"]) == 1)
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
        assert not starting.done()  # it is told of once it is kept
        other.rollback()
        assert ended(url, starting.result()).state == "succeeded"


def test_nothing_is_started_while_the_service_ends(run: DigitsRun) -> None:
    app = create_service([Hosted("index", run.index, run.task)], Settings(processes=0))
    with serving(app) as url:
        asyncio.run(app.state.jobs.drain())
        refused = httpx.post(f"{url}/reindex", json={})
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:gradtrace:problem:draining")


def test_several_indexes(run: DigitsRun, digits_index: DigitsRun) -> None:
    hosted = [Hosted("two", run.index, run.task), Hosted("three", digits_index.index, digits_index.task)]
    with serving(create_service(hosted, Settings(processes=0))) as url, Client(url) as client:
        assert len(client.index().checkpoints) == 2
        assert len(client.index("three").checkpoints) == 3
        found = client.influence(query_rows=[0], index="three")
        assert len(found.index.checkpoints) == 3
        assert "two, three" in httpx.get(f"{url}/index", params={"index": "four"}).text
