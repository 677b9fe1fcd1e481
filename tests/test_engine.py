"""Micro-batches, deadlines, lost callers and workers, and indexes that come and go. Over real HTTP where it can be."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from fastapi import FastAPI

import digits_task
import gradtrace
from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace import Index
from gradtrace.errors import TaskError
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client import Client, InfluenceAnswer, InvalidRequestError
from gradtrace_client.service_schemas import Problem
from gradtrace_indexer import delete_rows
from gradtrace_service.answers.influence import warm_up
from gradtrace_service.answers.rendering import RenderedRows
from gradtrace_service.app import create_app, create_service
from gradtrace_service.engine.engine import Engine, QueueFullError
from gradtrace_service.engine.work import (
    IndexUnavailableError,
    NotOpenYetError,
    OutOfMemoryError,
    Work,
    is_out_of_memory,
)
from gradtrace_service.engine.work import answer as answer_batch
from gradtrace_service.engine.workers import ThreadWorker
from gradtrace_service.indexes import catalog as catalog_module
from gradtrace_service.indexes import loading
from gradtrace_service.indexes.catalog import Catalog
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.indexes.open_index import OpenIndex
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

TASK = digits_task.TASK


@pytest.fixture
def run(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """A copy that a test may change."""
    shutil.copytree(digits_index.index.parent, tmp_path / "run")
    return DigitsRun(tmp_path / "run" / "checkpoints", tmp_path / "run" / "index", digits_index.task)


@contextmanager
def held(app: FastAPI) -> Iterator[None]:
    """Keep the worker busy meanwhile, so that requests wait together."""
    release = threading.Event()
    app.state.engine.workers[0].thread.submit(release.wait, 120)
    try:
        yield
    finally:
        release.set()


def ask_together(app: FastAPI, url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """The responses to requests that wait together, or are refused at once."""
    wait_until(lambda: app.state.ready)
    with httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(len(bodies) + 1) as pool, held(app):
        pool.submit(http.get, "/index")  # waits for the worker, so that the others wait in the queue
        wait_until(lambda: app.state.engine.computing == 1)
        asked = [pool.submit(http.post, "/influence", json=body) for body in bodies]
        wait_until(lambda: app.state.engine.waiting + sum(response.done() for response in asked) == len(bodies))
    return [response.result() for response in asked]


def test_requests_that_wait_are_answered_together_and_as_if_alone(digits_index: DigitsRun) -> None:
    app, index = create_app(digits_index.open(), Settings(batch_size=8)), digits_index.open()
    with serving(app) as url:
        responses = ask_together(app, url, [{"query_rows": [row], "k": 7} for row in range(12)])
    answers = [InfluenceAnswer.model_validate_json(response.content) for response in responses]
    assert 1 < max(answer.timing_ms.batch for answer in answers) <= 8
    for row, answer in enumerate(answers):
        alone, result = index.influence([TASK.query[row]], k=7)[0], answer.results[0]
        for end in ("proponents", "opponents"):
            assert [hit.row for hit in getattr(result, end)] == [hit.row for hit in getattr(alone, end)]
            scores = [[hit.score for hit in getattr(one, end)] for one in (result, alone)]
            np.testing.assert_allclose(*scores, rtol=1e-5)


class Fragile(type(TASK)):  # type: ignore[misc]
    """Images of one grey have a loss that is not finite; those of another exhaust the memory."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        grey = batch[0].flatten(1)
        if bool((grey == 77 / 255).all(1).any()):
            torch.empty(1 << 50, dtype=torch.uint8)
        losses = super().loss(model, batch)
        return torch.where((grey == 99 / 255).all(1), torch.nan, losses)


def fragile(digits_index: DigitsRun) -> FastAPI:
    task = Fragile(digits_task.model, TASK.train, TASK.query, class_names=digits_task.NAMES)
    task.normalise = TASK.normalise
    return create_app(gradtrace.open_index(digits_index.index, task))


def grey(value: int) -> dict[str, Any]:
    return {"example": {"image": [[value] * 8] * 8, "label": 3}}


def test_a_bad_request_in_a_batch_fails_alone(digits_index: DigitsRun, caplog: pytest.LogCaptureFixture) -> None:
    app = fragile(digits_index)
    good = [{"query_rows": [row]} for row in range(3)]
    with serving(app) as url:
        unreadable = {"example": {"image": "@@@"}}
        responses = ask_together(app, url, [*good, grey(99), unreadable, grey(77), grey(98)])
        statuses = [response.status_code for response in responses]
        assert statuses == [200, 200, 200, 422, 422, 500, 200]
        assert "not finite" in responses[3].text or "NaN" in responses[3].text
        assert responses[5].json()["type"] == "urn:gradtrace:problem:out-of-memory"
        assert "ask for fewer queries" in responses[5].text
        assert httpx.post(f"{url}/influence", json=good[0]).status_code == 200
    assert "ran out of memory: " in caplog.text
    index = digits_index.open()
    for row, response in enumerate(responses[:3]):
        found = InfluenceAnswer.model_validate_json(response.content).results[0].proponents
        assert [hit.row for hit in found] == [hit.row for hit in index.influence([TASK.query[row]])[0].proponents]


class Given:
    """Indexes of a worker, as a function gives them."""

    def __init__(self, get: Callable[[str | None], Index]) -> None:
        self.get = get

    def check(self, name: str | None, index: Index) -> None:
        pass

    def open_default(self) -> None:
        self.get(None)

    def states(self) -> dict[str, bool | None]:
        return {}


def test_one_bad_request_costs_few_passes(digits_index: DigitsRun) -> None:
    passes: list[int] = []

    def handler(index: Any, requests: Any, waited_ms: Any) -> list[str]:
        passes.append(len(requests))
        if "bad" in requests:
            raise KeyError("bad")
        return [f"answer to {request}" for request in requests]

    requests = [*map(str, range(11)), "bad", *map(str, range(12, 64))]
    works = [Work(None, handler, request) for request in requests]
    outcomes = answer_batch(Given(lambda _: digits_index.open()), works, [0.0] * len(works))
    assert [outcome for outcome in outcomes if isinstance(outcome, KeyError)] == [outcomes[11]]
    assert [outcome for at, outcome in enumerate(outcomes) if at != 11] == [
        f"answer to {request}" for request in requests if request != "bad"
    ]
    assert len(passes) == 1 + 2 * 6  # of 64: the whole, then two halves at each of six steps


def test_an_index_that_cannot_be_opened_is_tried_once_for_a_batch() -> None:
    tries: list[str | None] = []

    def closed(name: str | None) -> Index:
        tries.append(name)
        raise MemoryError("of the index")

    outcomes = answer_batch(Given(closed), [Work("a", warm_up)] * 8, [0.0] * 8)
    assert [type(outcome) for outcome in outcomes] == [OutOfMemoryError] * 8
    assert tries == ["a"]


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_memory_that_runs_out_is_recognised_by_whatever_reports_it(error: Exception, means_it: bool) -> None:
    assert is_out_of_memory(error) == means_it
    wrapped = TaskError("importing it failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == means_it


def test_memory_that_runs_out_while_an_example_is_read_is_told_as_such(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TASK), "parse", lambda *_: np.empty(1 << 60, dtype=np.uint8))
    with serving(create_app(digits_index.open())) as url:
        failed = httpx.post(f"{url}/influence", json=grey(7))
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:gradtrace:problem:out-of-memory")


def test_memory_that_runs_out_while_an_index_is_opened_is_told_as_such(
    digits_index: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = tmp_path / "greedy.py"
    task.write_text("import numpy as np\nTASK = np.empty(1 << 60, dtype=np.uint8)\n")
    monkeypatch.setattr(catalog_module, "_TRY_AGAIN_SECONDS", 1.0)
    hosted = [
        Hosted(name, digits_index.index, spec) for name, spec in (("a", digits_index.task), ("large", f"{task}:TASK"))
    ]

    def ask() -> httpx.Response:
        return httpx.post(f"{url}/influence", json={"query_rows": [0], "index": "large"}, timeout=600)

    with serving_when_ready(create_service(hosted, Settings(processes=0))) as url:
        failed = ask()
        assert (failed.status_code, failed.json()["type"]) == (503, "urn:gradtrace:problem:out-of-memory")
        assert failed.headers["retry-after"]
        task.write_text(
            "from gradtrace_indexer.task_loading import load_task\n"
            f"TASK = load_task({digits_index.task!r}, anew=True)\n"
        )
        wait_until(lambda: ask().status_code == 200)
    assert "index large cannot be opened: memory ran out" in caplog.text


def test_what_only_together_exhausts_the_memory_is_answered_alone(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, collate = create_app(digits_index.open()), TASK.collate
    largest = 0

    def costly(examples: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(examples))
        return collate(examples) if len(examples) == 1 else np.empty(len(examples) << 50, dtype=np.uint8)

    monkeypatch.setattr(type(TASK), "collate", lambda _, examples: costly(examples))  # models have copies of the task
    with serving(app) as url:
        responses = ask_together(app, url, [{"query_rows": [row]} for row in range(4)])
        together = httpx.post(f"{url}/influence", json={"query_rows": [0, 1]})
    assert [response.status_code for response in responses] == [200] * 4
    assert largest > 1
    assert (together.status_code, together.json()["type"]) == (500, "urn:gradtrace:problem:out-of-memory")


def test_a_process_whose_memory_is_limited_goes_on(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    app, process, collate = create_app(digits_index.open()), psutil.Process(), TASK.collate
    before = process.rlimit(psutil.RLIMIT_AS)

    def wide(examples: Any) -> Any:
        torch.empty(len(examples), 64 << 20, dtype=torch.uint8)
        return collate(examples)

    monkeypatch.setattr(type(TASK), "collate", lambda _, examples: wide(examples))
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        expected = httpx.post(f"{url}/influence", json={"query_rows": [0]}).json()["results"]
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (512 << 20), before[1]))
        try:
            failed = httpx.post(f"{url}/influence", json={"query_rows": list(range(60))})
            assert (failed.status_code, failed.json()["type"]) == (500, "urn:gradtrace:problem:out-of-memory")
            assert httpx.post(f"{url}/influence", json={"query_rows": [0]}).json()["results"] == expected
        finally:
            process.rlimit(psutil.RLIMIT_AS, before)


def test_training_data_that_cannot_be_read_is_no_fault_of_the_request(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        def __len__(self) -> int:
            return digits_task.TRAIN_ROWS

        def __getitem__(self, row: int) -> Any:
            raise OSError("a secret place")

    app = create_app(digits_index.open())
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        monkeypatch.setattr(TASK, "train", Gone())
        failed = httpx.post(f"{url}/influence", json={"query_rows": [0], "rescore": True})
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:gradtrace:problem:failure")
    assert "secret" not in failed.text
    assert "a secret place" in caplog.text


@pytest.mark.parametrize("name", ["loss", "collate", "label"])
def test_a_task_that_raises_fails_the_request_alone(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of no example")

    with serving(create_app(digits_index.open())) as url:
        with monkeypatch.context() as patch:
            patch.setattr(type(TASK), name, broken)
            failed = httpx.post(f"{url}/influence", json={"query_rows": [0]})
        assert (failed.status_code, failed.json()["type"]) == (500, "urn:gradtrace:problem:failure")
        assert httpx.post(f"{url}/influence", json={"query_rows": [0]}).status_code == 200
    assert "of no example" in caplog.text
    assert "of no example" not in failed.text


def test_the_wall_clock_may_jump(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps, wall = itertools.cycle([0.0, 1e7, -1e7, 3e8]), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + next(jumps))
    app = create_app(digits_index.open(), Settings(rate_limit=2, deadline_seconds=60))  # the third is due in 30 s
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        statuses = [httpx.post(f"{url}/influence", json={"query_rows": [0]}).status_code for _ in range(4)]
    assert statuses == [200] * 2 + [429] * 2


def test_what_takes_too_long_is_told_and_dropped(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(digits_index.open(), Settings(deadline_seconds=0.3))
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        computed = count_queries(monkeypatch)
        with held(app):
            late = [httpx.post(f"{url}/influence", json={"query_rows": [row]}) for row in range(2)]
        assert [response.status_code for response in late] == [504, 504]
        assert "longer" in Problem.model_validate_json(late[1].content).detail
        app.state.engine.settings = Settings()
        assert httpx.post(f"{url}/influence", json={"query_rows": [2]}).status_code == 200
    assert computed() == 2  # the one that the worker had taken, and the last


def count_queries(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many queries were computed from now on."""
    influence, sizes = Index.influence, []

    def counted(index: Index, examples: Any, **options: Any) -> Any:
        sizes.append(len(examples))
        return influence(index, examples, **options)

    monkeypatch.setattr(Index, "influence", counted)
    return lambda: sum(sizes)


def test_callers_without_a_body_that_went_away_cost_nothing(digits_index: DigitsRun) -> None:
    app = create_app(digits_index.open())
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        host = httpx.URL(url)
        with held(app):
            first = open_connection(host, b"GET /index HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: app.state.engine.computing)
            left = [open_connection(host, b"GET /self-influence HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(3)]
            wait_until(lambda: app.state.engine.waiting == 3)
            for connection in left:
                connection.close()
            wait_until(lambda: app.state.engine.waiting == 0)
        assert first.recv(1 << 16).startswith(b"HTTP/1.1 200")
        first.close()


def test_a_killed_service_leaves_no_workers(digits_index: DigitsRun, tmp_path: Path) -> None:
    words = ["serve", str(digits_index.index), "--task", digits_index.task, "--port", "0", "--processes", "2"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        service = psutil.Popen([sys.executable, "-m", "gradtrace_service", *words], stderr=stderr)

    def workers() -> list[psutil.Process]:
        return [one for child in service.children() for one in child.children()]  # forked by a process without threads

    wait_until(lambda: len(workers()) == 2)
    left = workers()
    wait_until(lambda: re.search(r"\bready$", log.read_text(), re.MULTILINE) is not None)  # a worker has answered
    service.kill()
    service.wait()
    assert psutil.wait_procs(left, timeout=120)[1] == []


def test_callers_that_went_away_cost_nothing(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(digits_index.open())
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        computed, host = count_queries(monkeypatch), httpx.URL(url)
        body = b'{"query_rows": [1]}'
        request = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with held(app):
            first = open_connection(host, request % len(body) + body)
            wait_until(lambda: app.state.engine.waiting == 0 and app.state.engine.computing == 1)
            gone = [open_connection(host, request % len(body) + body) for _ in range(5)]
            wait_until(lambda: app.state.engine.waiting == 5)
            for connection in gone:
                connection.close()
            wait_until(lambda: app.state.engine.waiting == 0)
        assert first.recv(15) == b"HTTP/1.1 200 OK"
        first.close()
        assert httpx.post(f"{url}/influence", json={"query_rows": [2]}).status_code == 200
    assert computed() == 2


def open_connection(url: httpx.URL, content: bytes) -> socket.socket:
    connection = socket.create_connection((url.host, url.port), timeout=20)
    connection.sendall(content)
    return connection


def test_half_open_clients_keep_nobody_waiting(digits_index: DigitsRun) -> None:
    with serving(create_app(digits_index.open())) as url:
        host = httpx.URL(url)
        slow = [open_connection(host, b"POST /influence HTTP/1.1\r\nHost: x\r\nX-Slow: ") for _ in range(20)]
        head = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        slow += [open_connection(host, head) for _ in range(20)]
        with Client(url, retries=0) as client:
            assert len(client.influence(query_rows=[0], k=3).results[0].proponents) == 3
        for connection in slow:
            connection.close()


def test_processes_answer_the_same_and_killed_ones_are_replaced(digits_index: DigitsRun) -> None:
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    settings = Settings(processes=2, deadline_seconds=300)
    app = create_service(hosted, settings)
    with serving(app) as url, Client(url, retries=0, timeout=300) as client:
        expected = [hit.row for hit in digits_index.open().influence([TASK.query[4]], k=6)[0].proponents]

        def rows() -> list[int]:
            return [hit.row for hit in client.influence(query_rows=[4], k=6).results[0].proponents]

        assert rows() == expected
        with pytest.raises(InvalidRequestError, match="60"):
            client.influence(query_rows=[60])
        wait_until(lambda: app.state.ready)
        for worker in app.state.engine.workers:
            before = worker.pid
            os.kill(before, signal.SIGKILL)
            assert [rows() for _ in range(2)] == [expected] * 2
            wait_until(lambda worker=worker, before=before: worker.pid not in (None, before))


def opened(catalog: Catalog, name: str | None = None) -> Index:
    """The index, when it is open."""
    while True:
        try:
            return catalog.get(name)
        except NotOpenYetError:
            time.sleep(0.01)


def test_memory_above_its_limit_unloads_the_index_not_asked_for_longest(
    digits_index: DigitsRun, run: DigitsRun
) -> None:
    hosted = [Hosted("a", digits_index.index, digits_index.task), Hosted("b", run.index, run.task)]
    catalog = Catalog(hosted, memory_limit=1)  # less than there can be
    try:
        first = opened(catalog, "a")
        assert opened(catalog, "a") is first
        assert opened(catalog, "b") is opened(catalog, "b")
        assert catalog.states() == {"a": False, "b": True}
        assert opened(catalog, "a") is not first
        with pytest.raises(gradtrace.QueryError, match="no index 'c'; this service has a, b"):
            catalog.get("c")
    finally:
        catalog.close()


def test_indexes_that_do_not_fit_together_are_answered_in_turn(digits_index: DigitsRun, run: DigitsRun) -> None:
    hosted = [Hosted("a", digits_index.index, digits_index.task), Hosted("b", run.index, run.task)]
    catalog = Catalog(hosted, memory_limit=1)
    try:
        for name, other in ("ab", "ba", "ab"):
            computing = opened(catalog, name)
            with pytest.raises(NotOpenYetError):
                catalog.get(other)
            if catalog.states()[name]:  # a batch for it is next, and the other is opened meanwhile
                computing = catalog.get(name)
                wait_until(lambda other=other: catalog.states()[other] is True)
                catalog.check(name, computing)
            assert opened(catalog, other) is not None
    finally:
        catalog.close()


HANGING_TASK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
while not Path({here!r}, "go on").exists():
    time.sleep(0.05)
from digits_task import TASK
"""


def test_an_index_whose_task_hangs_keeps_no_other_from_being_opened(
    digits_index: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_TURN_SECONDS", 0.1)
    source = tmp_path / "hanging_task.py"
    source.write_text(HANGING_TASK.format(tests=str(Path(__file__).parent), here=str(tmp_path)))
    hosted = [Hosted("hangs", digits_index.index, f"{source}:TASK"), Hosted("b", digits_index.index, digits_index.task)]
    catalog = Catalog(hosted)
    try:
        with pytest.raises(NotOpenYetError):
            catalog.get("hangs")
        time.sleep(0.5)  # its task is being loaded
        wait_until(lambda: is_open(catalog, "b"))
        assert catalog.states() == {"hangs": False, "b": True}
    finally:
        (tmp_path / "go on").touch()
        catalog.close()


def is_open(catalog: Catalog, name: str) -> bool:
    try:
        return catalog.get(name) is not None
    except NotOpenYetError:
        return False


REPLACING_TASK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from digits_task import TASK
render, damaged = TASK.render, Path({damaged!r})
def rendered(example):  # called once the files were verified
    if damaged.exists():
        damaged.replace({shard!r})
    return render(example)
TASK.render = rendered
"""


@pytest.mark.parametrize("at_start", [True, False])
def test_a_file_that_is_replaced_while_an_index_is_opened_is_verified(
    run: DigitsRun, tmp_path: Path, at_start: bool
) -> None:
    shard = run.index / read_manifest(run.index).shards[0].rows.path
    damaged, source = tmp_path / "damaged", tmp_path / "replacing_task.py"
    damaged.write_bytes(bytes(shard.stat().st_size))
    source.write_text(REPLACING_TASK.format(tests=str(Path(__file__).parent), damaged=str(damaged), shard=str(shard)))
    catalog = Catalog([Hosted("digits", run.index, f"{source}:TASK")])
    try:
        if at_start:
            with pytest.raises(IndexUnavailableError, match="replaced while the index was opened"):
                catalog.open_default()
        wait_until(lambda: is_refused(catalog))
    finally:
        catalog.close()


def is_refused(catalog: Catalog) -> bool:
    """Whether it is found damaged; it must never be open."""
    try:
        catalog.get(None)
    except NotOpenYetError:
        return False
    except IndexUnavailableError as error:
        return "does not match its checksum" in str(error)
    raise AssertionError("the index is open")


@pytest.fixture
def catalog(run: DigitsRun) -> Iterator[Catalog]:
    catalog = Catalog([Hosted("digits", run.index, run.task)])
    yield catalog
    catalog.close()


def generation(catalog: Catalog) -> int:
    return opened(catalog).manifest.generation


def test_a_damaged_generation_is_told_once_and_taken_over_when_repaired(
    run: DigitsRun, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    assert generation(catalog) == 1
    made = Path(shutil.copytree(run.index, run.index.with_name("made")))
    delete_rows(made, [3])
    file = read_manifest(made).deleted
    assert file is not None
    content = (made / file.path).read_bytes()
    (run.index / file.path).parent.mkdir()
    (run.index / file.path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (made / "manifest.json").replace(run.index / "manifest.json")
    wait_until(lambda: "the old generation goes on answering" in caplog.text)
    time.sleep(2.5)  # it is looked at again and again
    assert generation(catalog) == 1
    assert caplog.text.count("the old generation goes on answering") == 1
    (run.index / file.path).write_bytes(content)
    wait_until(lambda: generation(catalog) == 2)
    assert not opened(catalog).present[3]


def test_a_generation_whose_task_raises_is_tried_again(
    run: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog_module, "_RETAKE_SECONDS", 1.0)
    source = tmp_path / "task.py"
    sound = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom digits_task import TASK\n"
    source.write_text(sound)
    catalog = Catalog([Hosted("digits", run.index, f"{source}:TASK")])
    try:
        assert generation(catalog) == 1
        source.write_text("1 / 0\n")
        delete_rows(run.index, [3])
        wait_until(lambda: "the old generation goes on answering" in caplog.text)
        assert generation(catalog) == 1
        source.write_text(sound)
        wait_until(lambda: generation(catalog) == 2)
    finally:
        catalog.close()
    assert "ZeroDivisionError" in caplog.text


def test_an_index_deleted_under_the_service(run: DigitsRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Path(shutil.copytree(run.index, run.index.with_name("other")))
    hosted = [Hosted("open", run.index, run.task), Hosted("late", other, run.task)]
    with serving(create_service(hosted, Settings(processes=0))) as url, Client(url, retries=0) as client:
        before = client.influence(query_rows=[0])
        for path in (run.index, other):
            path.rename(path.with_name(path.name + "-away"))
        time.sleep(1.5)  # the follower looks
        assert client.influence(query_rows=[0]).results == before.results
        refused = httpx.get(f"{url}/index", params={"index": "late"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert str(tmp_path) not in refused.text
        assert httpx.post(f"{url}/reindex", json={}).status_code == 503
        other.with_name("other-away").rename(other)
        assert client.index("late").rows == 400


def test_renderings_are_kept_up_to_their_limit() -> None:
    class Counted(type(TASK)):  # type: ignore[misc]
        rendered = 0

        def render(self, example: Any) -> dict[str, Any]:
            self.rendered += 1
            return {"text": "x" * 100}

    task = Counted(digits_task.model, TASK.train)
    rows = RenderedRows(task, kept=350)
    assert [rows(row) for row in (0, 1, 0, 2, 0)] == [{"text": "x" * 100}] * 5
    assert task.rendered == 3
    rows(3)  # no room for four: 1 was not shown for longest
    rows(0)
    assert task.rendered == 4
    rows(1)
    assert task.rendered == 5


def test_who_fills_the_queue_keeps_no_other_client_out(digits_index: DigitsRun) -> None:
    engine = Engine([ThreadWorker(OpenIndex(digits_index.open()))], Settings(queue_size=3))

    async def asked() -> list[Any]:
        def ask(client: str, number: int) -> asyncio.Task[int]:
            return asyncio.ensure_future(engine.run(Work(None, numbers, number, client=client)))

        many = [ask("many", number) for number in range(5)]
        few = [ask("few", number) for number in range(5, 7)]
        return await asyncio.gather(*many, *few, return_exceptions=True)

    outcomes = asyncio.run(asked())
    engine.close()
    # All arrive before a worker takes any; two of the first client's are refused by themselves, and one for the other.
    assert [outcome if isinstance(outcome, int) else type(outcome) for outcome in outcomes] == [
        *[0, 1, QueueFullError, QueueFullError, QueueFullError],
        *[5, QueueFullError],
    ]


def numbers(index: Index, requests: Sequence[int], waited_ms: Sequence[float]) -> list[int]:
    return list(requests)
