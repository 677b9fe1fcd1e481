"""Jobs about rows that a client names, and the generations that they make. All over real HTTP."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

import digits_task
import gradtrace
from conftest import DigitsRun, program, wait_until
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client import Client, InvalidRequestError, ProblemError
from gradtrace_indexer import delete_rows, prune
from gradtrace_indexer.writing.files import sole_writer
from gradtrace_service.app import create_app, create_service
from gradtrace_service.indexes import jobs as jobs_module
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings


@pytest.fixture
def run(copied_run: DigitsRun) -> DigitsRun:
    return copied_run


@pytest.fixture
def client(run: DigitsRun) -> Iterator[Client]:
    with serving(service(run)) as address, Client(address, retries=0) as connected:
        yield connected


@pytest.fixture(scope="module")
def idle(idle_run: DigitsRun) -> Iterator[Client]:
    """Of a service that is asked for nothing that it does."""
    with serving(service(idle_run)) as address, Client(address, retries=0) as connected:
        yield connected


def service(run: DigitsRun) -> FastAPI:
    return create_service([Hosted("index", run.index, run.task)], Settings(processes=0))


def test_deleted_rows_are_in_no_answer_and_come_back_by_rolling_back(run: DigitsRun, client: Client) -> None:
    before = client.influence(query_rows=[0], k=5).results[0]
    deleted = [hit.row for hit in before.proponents]
    remaining = run.open().scores([digits_task.TASK.query[0]])[0]
    remaining[deleted] = -np.inf
    job = client.wait(client.delete_rows(deleted))
    assert (job.operation, job.rows, job.state, job.generation, job.progress) == ("delete", 5, "succeeded", 2, 1.0)
    after = client.influence(query_rows=[0], k=5)
    assert after.index.generation == 2
    assert [hit.row for hit in after.results[0].proponents] == np.argsort(-remaining, kind="stable")[:5].tolist()
    wait_until(lambda: not list((run.index / "jobs").iterdir()))
    client.wait(client.reindex(roll_back_to=1))
    assert client.influence(query_rows=[0], k=5).results[0].proponents == before.proponents


def test_a_long_list_reaches_the_process(run: DigitsRun, client: Client) -> None:
    """Longer than a system's command line may be: some rows are named a thousand times."""
    rows = [*range(300), *[7] * 250_000]
    job = client.wait(client.delete_rows(rows))
    assert (job.state, job.rows) == ("succeeded", 250_300)
    assert np.flatnonzero(~gradtrace.open_index(run.index, digits_task.TASK).present).tolist() == list(range(300))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "rows"),
        ({"rows": []}, "rows"),
        ({"rows": [3, -1]}, "rows[1]"),
        ({"rows": [3, 1.5]}, "rows[1]"),
        ({"rows": ["3"]}, "rows[0]"),
        ({"rows": [3, 400]}, "rows[1]"),
        ({"rows": 3}, "rows"),
        ({"rows": [3], "row": 3}, "row"),
        ({"rows": [3], "index": "other"}, "index"),
        ({"rows": [0] * (2**18 + 1)}, "rows"),
    ],
)
def test_what_cannot_be_deleted_is_refused_by_its_field(
    idle_run: DigitsRun, idle: Client, body: object, field: str
) -> None:
    refused = idle._http.post("/rows/delete", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == field
    assert idle.jobs().jobs == []
    assert read_manifest(idle_run.index).generation == 1


@pytest.mark.long
def test_the_last_row_stays(run: DigitsRun, client: Client) -> None:
    job = client.delete_rows(range(400))
    *_, last = client.follow(job)
    assert last.state == "failed"
    assert "no row" in str(last.error)
    assert read_manifest(run.index).generation == 1


def test_an_index_has_one_writer(run: DigitsRun, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_LOCKED_SECONDS", 0.2)
    with sole_writer(run.index):
        job = client.delete_rows([3])
        for start in (lambda: client.delete_rows([3]), client.reindex, lambda: client.reindex(roll_back_to=1)):
            with pytest.raises(ProblemError, match=job.id) as caught:
                start()
            assert caught.value.status == 409
    assert client.wait(job).generation == 2


@pytest.mark.long
def test_a_killed_service_deletes_the_rows_when_it_is_started_again(run: DigitsRun) -> None:
    """It is killed while another process holds the index, so that its job cannot have ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "gradtrace_service", "serve", str(run.index), "--task", run.task, "--port", str(port)]
    with sole_writer(run.index):
        with program(*words) as served, Client(f"http://127.0.0.1:{port}", retries=0) as client:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 1800)
            job = client.delete_rows([3, 5])
            served.send_signal(signal.SIGKILL)
        with serving(service(run)) as url, Client(url) as client:
            assert client.job(job).state == "running"
    with serving(service(run)) as url, Client(url) as client:
        assert (client.wait(job).state, client.job(job).rows) == ("succeeded", 2)
    assert np.flatnonzero(~run.open().present).tolist() == [3, 5]


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def test_where_the_rows_cannot_be_kept_the_job_fails(
    run: DigitsRun, client: Client, largest_file: Callable[[int], None]
) -> None:
    largest_file(1000)
    job = client.delete_rows(range(300))
    largest_file(resource.RLIM_INFINITY)
    assert (job.state, job.ended is not None) == ("failed", True)
    assert "free some space" in str(job.error)
    assert client.wait(client.delete_rows(range(300))).generation == 2


@pytest.mark.long
def test_the_generations_are_listed(run: DigitsRun, client: Client) -> None:
    (first,) = client.generations().generations
    assert (first.generation, first.rows, first.checkpoints, first.current, first.reason) == (1, 400, 3, True, "build")
    began = datetime.now(timezone.utc).timestamp()
    delete_rows(run.index, [3, 5, 7])
    client.wait(client.delete_rows([7, 9]))
    client.wait(client.reindex(roll_back_to=2))
    listed = client.generations().generations
    assert [(one.generation, one.rows, one.current, one.reason, one.problem) for one in listed] == [
        (4, 397, True, "roll back", None),
        (3, 396, False, "delete rows", None),
        (2, 397, False, "delete rows", None),
        (1, 400, False, "build", None),
    ]
    times = [one.created.timestamp() for one in listed if one.created]
    assert len(times) == 4
    assert times == sorted(times, reverse=True)
    assert times[-1] < began - 1e-2 < times[-2]
    assert list(client.generations("index").to_pandas()["generation"]) == [4, 3, 2, 1]
    (run.index / "generations" / "3.json").write_text("{}")
    damaged = client.generations().generations[1]
    assert (damaged.generation, damaged.rows, damaged.reason) == (3, None, None)
    assert "damaged" in str(damaged.problem)
    assert str(run.index) not in httpx.get(f"{client._http.base_url}/generations").text
    (run.index / "generations" / "3.json").unlink()
    prune(run.index, keep=2)
    assert [one.generation for one in client.generations().generations] == [4, 2]
    assert client.generations().generations[1].created is None  # the one before it is gone
    with pytest.raises(InvalidRequestError, match="other"):
        client.generations("other")


def test_the_generations_of_an_index_that_cannot_be_opened_are_listed(run: DigitsRun, client: Client) -> None:
    delete_rows(run.index, [3])
    for path in (run.index / "deleted").iterdir():
        path.write_bytes(b"")
    listed = client.generations().generations
    assert [(one.generation, one.rows) for one in listed] == [(2, 399), (1, 400)]
    (run.index / "manifest.json").unlink()
    with pytest.raises(ProblemError) as caught:
        client.generations()
    assert (caught.value.status, caught.value.problem.type) == (503, "urn:gradtrace:problem:index-unavailable")


def test_a_service_over_an_open_index_lists_no_generations(digits_index: DigitsRun) -> None:
    with serving(create_app(digits_index.open())) as url:
        assert httpx.get(f"{url}/generations").status_code == 404
        assert httpx.post(f"{url}/rows/delete", json={"rows": [1]}).status_code == 404
