"""Marks, saved questions and events over real HTTP: several people, several services, files that fail, hostile input."""

from __future__ import annotations

import csv
import io
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest

from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace_client import AsyncClient, AuthenticationError, BusyError, Client, ConflictError, ForbiddenError
from gradtrace_client import InvalidRequestError, NotFoundError, ServiceError, ServiceEvent
from gradtrace_indexer import delete_rows
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http import state_routes
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

SCRIPT = "<script>alert(1)</script>"


def service(run: DigitsRun, state: Path, **settings: Any) -> Any:
    hosted = [Hosted("digits", run.index, run.task)]
    return serving(create_service(hosted, Settings(processes=0, state=state, **settings)))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


@pytest.fixture
def url(digits_index: DigitsRun, state: Path) -> Iterator[str]:
    with service(digits_index, state) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, retries=0) as connected:
        yield connected


def test_marks_are_set_listed_undone_and_removed(client: Client) -> None:
    assert client.marks().counts == dict.fromkeys(("wrong", "right", "unsure", "remove"), 0)
    change = client.mark([3, 1], "wrong", label="four", note="a 4")
    assert [(mark.row, mark.label, mark.label_name, mark.note, mark.who) for mark in change.results] == [
        (1, 4, "four", "a 4", None),
        (3, 4, "four", "a 4", None),
    ]
    assert client.mark([1], "right", label=7).results[0].label_name == "seven"
    with pytest.raises(ConflictError) as refused:
        client.undo_marks(change)
    assert [(entry.row, entry.mark and entry.mark.mark) for entry in refused.value.conflicts] == [(1, "right")]
    removed = client.unmark([1, 2])
    assert (removed.results, removed.unmarked) == ([], [1])
    assert client.undo_marks(removed).results[0].mark == "right"
    page = client.marks("wrong", rows=[3, 4])
    assert (page.rows_total, page.results) == (1, [change.results[1]])
    assert page.counts == {"wrong": 1, "right": 1, "unsure": 0, "remove": 0}
    assert client.unmark([9]).change is None
    with pytest.raises(NotFoundError):
        client.undo_marks(99)
    assert "<td>wrong</td>" in page._repr_html_()
    assert list(page.to_pandas().row) == [3]


def test_of_two_people_who_mark_a_row_at_once_the_second_is_told_what_the_first_set(url: str) -> None:
    start = threading.Barrier(4)

    def person(name: int) -> dict[int, int]:
        """By row that it marked: the version."""
        marked, refused = {}, 0
        with Client(url, retries=0, timeout=600) as client:
            for row in range(12):
                start.wait(300)
                try:
                    change = client.mark([row, 50 + row], "wrong", note=str(name), expected={row: 0, 50 + row: 0})
                except ConflictError as conflict:
                    assert [entry.mark and entry.mark.mark for entry in conflict.conflicts] == ["wrong", "wrong"]
                    refused += 1
                else:
                    marked[row] = change.results[0].version
            assert refused + len(marked) == 12
        return marked

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(person, range(4)))
    assert sorted(row for rows in won for row in rows) == list(range(12))  # each by exactly one
    with Client(url) as client:
        there = {mark.row: (mark.note, mark.version) for mark in client.marks(k=1000).results}
    wanted = {row: (str(name), version) for name, rows in enumerate(won) for row, version in rows.items()}
    assert there == wanted | {50 + row: mark for row, mark in wanted.items()}


@contextmanager
def program(run: DigitsRun, *flags: str, before: tuple[str, ...] = ()) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`gradtrace serve` in a process, once it is alive."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "gradtrace_service", "serve", f"digits={run.index}", "--task", run.task]
    process = subprocess.Popen([*before, *words, "--port", port, *flags], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _answers(f"{url}/healthz"))
        yield process, url
    finally:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def test_no_mark_that_was_acknowledged_is_lost_when_the_service_is_killed(digits_index: DigitsRun, state: Path) -> None:
    acknowledged: dict[int, tuple[int, str]] = {}
    for life in range(2):
        with program(digits_index, "--state", str(state), "--grace-seconds", "0") as (process, url):

            def storm(person: int, url: str = url, life: int = life) -> None:
                with Client(url, retries=0) as client:
                    for number in range(100_000):
                        row, note = 100 * person + number % 100, f"{life} {number}"
                        try:
                            change = client.mark([row], "wrong", note=note)
                        except Exception:
                            return
                        acknowledged[row] = change.results[0].version, note

            people = [threading.Thread(target=storm, args=(person,)) for person in range(4)]
            for person in people:
                person.start()
            begun = len(acknowledged)
            wait_until(lambda begun=begun: len(acknowledged) > begun + (60 if begun == 0 else 0))
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            for person in people:
                person.join()
    with service(digits_index, state) as url, Client(url) as client:
        there = {mark.row: (mark.version, mark.note) for mark in client.marks(k=1000).results}
    assert len(acknowledged) >= 60
    for row, (version, note) in acknowledged.items():
        kept_version, kept_note = there[row]  # or a later one, whose acknowledgement was lost with the service
        assert (kept_version, kept_note) == (version, note) or kept_version > version
    with closing(sqlite3.connect(state)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_services_share_a_file_and_tell_of_each_others_changes(digits_index: DigitsRun, state: Path) -> None:
    with service(digits_index, state) as one, service(digits_index, state) as other:
        with Client(one) as first, Client(other) as second:
            first.mark([1], "wrong")
            assert second.marks().results == first.marks().results
            with listening(other) as events:
                change = first.mark([2], "right")
                wait_until(lambda: ServiceEvent(kind="marks", index="digits", change=change.change) in events)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda row: (first, second)[row % 2].mark([row], "remove"), range(10, 40)))
            assert first.marks("remove").rows_total == second.marks("remove").rows_total == 30


@contextmanager
def listening(url: str, **arguments: Any) -> Iterator[list[ServiceEvent]]:
    """The events that have come so far, from when the service has begun to send."""
    events: list[ServiceEvent] = []
    client = Client(url, **arguments)

    def listen() -> None:
        with httpx.stream("GET", f"{url}/events", headers=client._http.headers, timeout=600) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            begun.set()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(ServiceEvent.model_validate_json(line.removeprefix("data: ")))

    begun, listener = threading.Event(), threading.Thread(target=listen, daemon=True)
    listener.start()
    assert begun.wait(300)
    with client:
        # The first look is made after the headers are sent: change something until that is told.
        wait_until(lambda: bool(client.save_question("begun", "#")) and any(one.kind == "questions" for one in events))
        yield events
