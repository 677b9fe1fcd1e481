"""What the state file knows of jobs after the service has ended, also by being killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest

from conftest import DigitsRun, keep_job, program, wait_until
from gradtrace_client import Client
from gradtrace_client.service_schemas import Job
from gradtrace_indexer.writing.files import sole_writer
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

PATIENCE = 600  # seconds


@pytest.fixture
def run(growing_run: DigitsRun) -> DigitsRun:
    return growing_run


@contextmanager
def service(run: DigitsRun) -> Iterator[Client]:
    hosted = Hosted("index", run.index, run.task)
    with serving(create_service([hosted], Settings(processes=0))) as url, Client(url) as client:
        yield client


@contextmanager
def killed_in_the_end(run: DigitsRun, keys: Path) -> Iterator[str]:
    """The address of `gradtrace serve` in a process of its own, which gets no chance to write anything down."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "gradtrace_service", "serve", str(run.index), "--task", run.task, "--processes", "0"]
    words += ["--port", str(port), "--api-key-file", str(keys)]
    with program(*words, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), PATIENCE)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGKILL)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def test_jobs_are_known_after_the_service_was_killed(run: DigitsRun, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "anna", [Scope.query, Scope.admin])
    with killed_in_the_end(run, tmp_path / "keys") as url, Client(url, api_key=key) as client:
        *_, failed = client.follow(client.reindex(roll_back_to=7))
        deletion = client.wait(client.delete_rows([3]))
        with sole_writer(run.index):  # so that the process of the next one waits
            interrupted = client.reindex()
            wait_until(lambda: client.job(interrupted).state == "running")
    with killed_in_the_end(run, tmp_path / "keys") as url, Client(url, api_key=key) as client:
        jobs = {job.id: job for job in client.jobs().jobs}
        assert list(jobs) == [interrupted.id, deletion.id, failed.id]
        assert {job.who for job in jobs.values()} == {"anna"}
        assert (jobs[failed.id], jobs[deletion.id]) == (failed, deletion)
        last = client.wait(interrupted)
        assert (last.state, last.generation, last.interruptions) == ("succeeded", 3, 1)
        assert last.created == interrupted.created
    with killed_in_the_end(run, tmp_path / "keys") as url, Client(url, api_key=key) as client:
        assert client.job(interrupted) == last


def test_a_service_that_is_started_again_resumes_its_job(run: DigitsRun) -> None:
    with service(run) as client:
        job = client.reindex()
    with service(run) as client:
        *_, last = client.follow(job)
    assert (last.state, last.generation, last.interruptions) == ("succeeded", 2, 1), last.error


def running(number: int, **fields: object) -> Job:
    created = datetime.now(timezone.utc) + timedelta(days=number)
    known = {"index": "index", "operation": "roll back", "roll_back_to": 7, "state": "running", "progress": 0.0}
    return Job.model_validate({"id": f"{number:x}" * 16, "generation": 1, "created": created, **known, **fields})


@pytest.mark.long
def test_of_jobs_that_seem_to_run_on_one_index_the_latest_is_resumed(run: DigitsRun) -> None:
    for number in range(3):
        keep_job(run.index, running(number))
    with service(run) as client:
        wait_until(lambda: client.jobs().jobs[0].state != "running")
        jobs = client.jobs().jobs
    assert [(job.state, job.interruptions) for job in jobs] == [("failed", 1), ("interrupted", 0), ("interrupted", 0)]
    assert all(job.ended for job in jobs)
    assert "keeps no generation 7" in str(jobs[0].error)
    assert {job.error for job in jobs[1:]} == {"how it ended is unknown"}


def test_a_service_leaves_the_jobs_of_other_indexes_of_the_same_name_alone(run: DigitsRun, tmp_path: Path) -> None:
    """Two services may share a state file; an index that is moved leaves its jobs behind."""
    keep_job(run.index, running(1))
    shutil.copytree(run.checkpoints, tmp_path / "moved" / "checkpoints")
    moved = Path(shutil.copytree(run.index, tmp_path / "moved" / "index"))
    settings = Settings(processes=0, state=run.index.with_name("index.state.sqlite"))
    with serving(create_service([Hosted("index", moved, run.task)], settings)) as url, Client(url) as client:
        assert client.jobs().jobs == []


def test_a_damaged_state_file_keeps_no_job_from_running(run: DigitsRun, caplog: pytest.LogCaptureFixture) -> None:
    run.index.with_name("index.state.sqlite").write_bytes(b"no database" * 1000)
    with service(run) as client:
        assert client.jobs().jobs == []
        assert client.wait(client.reindex()).generation == 2
    assert "earlier jobs are not known" in caplog.text
    assert "the states of jobs could not be kept" in caplog.text


@pytest.mark.long
def test_files_of_others_where_jobs_have_theirs_are_left_alone(run: DigitsRun) -> None:
    (run.index / "jobs").mkdir()
    (run.index / "jobs" / "notes.json").write_text("precious")
    with service(run) as client:
        client.wait(client.delete_rows([3]))
        wait_until(lambda: len(list((run.index / "jobs").iterdir())) == 1)
    assert (run.index / "jobs" / "notes.json").read_text() == "precious"
