"""Marks, saved questions and events over real HTTP: several people and services, files that fail, hostile input."""

from __future__ import annotations

import csv
import io
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest

from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace_client import (
    AuthenticationError,
    BusyError,
    Client,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    ServiceEvent,
)
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


def copied(run: DigitsRun, folder: Path) -> DigitsRun:
    """With its checkpoints, which an index finds beside itself."""
    checkpoints = Path(shutil.copytree(run.checkpoints, folder / "checkpoints"))
    return DigitsRun(checkpoints, Path(shutil.copytree(run.index, folder / "index")), run.task)


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

    def person(name: int) -> tuple[dict[int, int], list[str | None]]:
        """By row that it marked: the version. And what conflicts showed."""
        marked, shown = dict[int, int](), list[str | None]()
        with Client(url, retries=0, timeout=600) as client:
            for row in range(12):
                start.wait(300)
                try:
                    change = client.mark([row, 50 + row], "wrong", note=str(name), expected={row: 0, 50 + row: 0})
                except ConflictError as conflict:
                    shown += [entry.mark and entry.mark.note for entry in conflict.conflicts]
                else:
                    marked[row] = change.results[0].version
        return marked, shown

    with ThreadPoolExecutor(4) as pool:
        won, shown = zip(*pool.map(person, range(4)), strict=True)
    assert sorted(row for rows in won for row in rows) == list(range(12))  # each by exactly one
    with Client(url) as client:
        there = {mark.row: (mark.note, mark.version) for mark in client.marks(k=1000).results}
    wanted = {row: (str(name), version) for name, rows in enumerate(won) for row, version in rows.items()}
    assert there == wanted | {50 + row: mark for row, mark in wanted.items()}
    for rows, notes in zip(won, shown, strict=True):
        assert notes == [wanted[row][0] for row in range(12) if row not in rows for _ in range(2)]


@contextmanager
def program(run: DigitsRun, *flags: str, before: tuple[str, ...] = ()) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`gradtrace serve` in a process, once it is alive."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "gradtrace_service", "serve", f"digits={run.index}", "--task", run.task]
    process = subprocess.Popen([*before, *words, "--port", port, *flags], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _answers(f"{url}/healthz"), 600)
        assert process.poll() is None
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
    acknowledged: list[tuple[int, int, str]] = []  # row, version, note
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
                        acknowledged.append((row, change.results[0].version, note))

            people = [threading.Thread(target=storm, args=(person,)) for person in range(4)]
            for person in people:
                person.start()
            enough = len(acknowledged) + 40
            wait_until(lambda enough=enough: len(acknowledged) >= enough)
            process.send_signal(signal.SIGKILL)
            for person in people:
                person.join()
    with service(digits_index, state) as url, Client(url) as client:
        there = {mark.row: (mark.version, mark.note) for mark in client.marks(k=1000).results}
    for row, version, note in acknowledged:  # or a later one, whose acknowledgement was lost with the service
        assert there[row] == (version, note) or there[row][0] > version
    with closing(sqlite3.connect(state)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_services_share_a_file_and_tell_of_each_others_changes(digits_index: DigitsRun, state: Path) -> None:
    with ExitStack() as stack:
        urls = [stack.enter_context(service(digits_index, state)) for _ in range(2)]
        first, second = (stack.enter_context(Client(url)) for url in urls)
        first.mark([1], "wrong")
        assert second.marks().results == first.marks().results
        with listening(urls[1]) as events:
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
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            for line in lines:
                tell(line)

    def tell(line: str) -> None:
        events.append(ServiceEvent.model_validate_json(line))

    begun, listener = threading.Event(), threading.Thread(target=listen, daemon=True)
    listener.start()
    assert begun.wait(300)
    with client:
        # The first look is made after the headers are sent: change something until that is told.
        wait_until(lambda: bool(client.save_question("begun", "#")) and any(one.kind == "questions" for one in events))
        yield events


def test_events_tell_what_has_changed_and_end_with_the_service(digits_index: DigitsRun, tmp_path: Path) -> None:
    run = copied(digits_index, tmp_path)
    with service(run, tmp_path / "state.sqlite") as url, listening(url) as events, Client(url) as client:
        wanted = []
        change = client.mark([4], "unsure")
        wanted.append(ServiceEvent(kind="marks", index="digits", change=change.change))
        delete_rows(run.index, [399])
        wanted.append(ServiceEvent(kind="generation", index="digits", generation=2))
        job = client.reindex(roll_back_to=7)  # which does not exist
        wanted.append(ServiceEvent(kind="job", index="digits", job=job.id, state="failed"))
        wait_until(lambda: all(event in events for event in wanted))
    assert events.index(wanted[0]) < events.index(wanted[2])


def test_the_sdk_follows_events(url: str) -> None:
    with Client(url) as writer, Client(url) as reader:
        stop = threading.Event()

        def mark() -> None:
            while not stop.wait(0.2):
                writer.mark([1], "right")

        marking = threading.Thread(target=mark)
        marking.start()
        assert next(iter(reader.events())).kind == "marks"
        stop.set()
        marking.join()


def test_who_one_is(digits_index: DigitsRun, tmp_path: Path) -> None:
    keys, state = tmp_path / "keys", tmp_path / "state.sqlite"
    ann, keeper = add_key(keys, "ann", [Scope.query]), add_key(keys, "keeper", [Scope.admin])
    with service(digits_index, state, api_key_file=keys) as url:
        with Client(url, ann, retries=0) as client:
            me = client.whoami()
            assert (me.name, me.scopes, me.keys_required, me.read_only) == ("ann", ["query"], True, False)
            assert client.mark([1], "wrong").results[0].who == "ann"
            assert client.save_question("Why?", "?row=1").who == "ann"
            with listening(url, api_key=ann) as events:
                assert {event.kind for event in events} == {"questions"}
        with Client(url, keeper, retries=0) as client:  # who may not ask learns why
            assert client.whoami().scopes == ["admin"]
            with pytest.raises(ForbiddenError):
                client.marks()
        with Client(url, "wrong", retries=0) as client, pytest.raises(AuthenticationError):
            client.whoami()
        with Client(url, "wrong", retries=0) as client, pytest.raises(AuthenticationError):
            next(iter(client.events()))
    with serving(create_app(digits_index.open())) as url, Client(url, retries=0) as client:
        me = client.whoami()
        assert (me.name, me.scopes, me.keys_required, me.read_only) == (None, ["admin", "query"], False, True)
        with pytest.raises(NotFoundError):  # an open index has no place of its own for marks
            client.marks()


def test_an_open_index_keeps_marks_where_the_settings_say(digits_index: DigitsRun, state: Path) -> None:
    with serving_when_ready(create_app(digits_index.open(), Settings(state=state))) as url, Client(url) as client:
        client.mark([1], "wrong", label="two")
        assert client.marks().results[0].label == 2
        with pytest.raises(InvalidRequestError, match="without a name"):
            client.marks(index="digits")


def test_without_a_setting_marks_are_kept_beside_the_index(digits_index: DigitsRun, tmp_path: Path) -> None:
    index = copied(digits_index, tmp_path / "run").index
    hosted = [Hosted("digits", index, digits_index.task)]
    with serving(create_service(hosted, Settings(processes=0))) as url, Client(url) as client:
        client.marks()
        assert {path.name for path in index.parent.iterdir()} == {"index", "checkpoints"}
        client.mark([1], "wrong")
    assert {path.name for path in index.parent.iterdir()} == {"index", "checkpoints", "index.state.sqlite"}


def test_marks_are_exported(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_routes, "_PIECE", 7)
    client.mark(list(range(30)), "wrong", label=3, note='=HYPERLINK("http://evil.example")')
    client.mark([5, 17, 29], "remove", note='two\nlines, "quoted"')
    client.mark([18], "right", label=-0.0)
    there = client.marks(k=1000).results
    table = list(csv.DictReader(io.StringIO(client.export_marks().decode(), newline="")))
    assert [int(line["row"]) for line in table] == [mark.row for mark in there] == list(range(30))
    assert table[0]["note"] == "'" + (there[0].note or "")
    assert table[5]["note"] == 'two\nlines, "quoted"'
    assert [line["mark"] for line in table] == [mark.mark for mark in there]
    read = pyarrow.parquet.read_table(io.BytesIO(client.export_marks("parquet"))).to_pylist()
    assert [line["when"].timestamp() for line in read] == [mark.when.timestamp() for mark in there]
    assert [(line["row"], line["note"], line["label_name"], line["version"]) for line in read] == [
        (mark.row, mark.note, mark.label_name, mark.version) for mark in there
    ]
    assert client.export_marks("rows", mark="remove") == b"5\n17\n29\n"
    assert client.export_marks("rows", mark="unsure") == b""
    assert pyarrow.parquet.read_table(io.BytesIO(client.export_marks("parquet", mark="unsure"))).num_rows == 0


@pytest.mark.parametrize("beginning", ["=", "+", "-", "@", "\t=", "\r=", "\n="])
def test_no_cell_of_the_csv_file_is_a_formula(client: Client, beginning: str) -> None:
    client.mark([1], "wrong", note=f"{beginning}1+1")
    (line,) = csv.DictReader(io.StringIO(client.export_marks().decode(), newline=""))
    assert line["note"].startswith("'")


HOSTILE: list[tuple[str, str, Any, str]] = [
    ("PUT", "/marks", {"rows": [], "mark": "wrong"}, "rows"),
    ("PUT", "/marks", {"rows": list(range(2001)), "mark": "wrong"}, "rows"),
    ("PUT", "/marks", {"rows": [400], "mark": "wrong"}, "rows[0]"),
    ("PUT", "/marks", {"rows": [0, 2**53 - 1], "mark": "wrong"}, "rows[1]"),
    ("PUT", "/marks", {"rows": [2**53], "mark": "wrong"}, "rows[0]"),
    ("PUT", "/marks", {"rows": [10**400], "mark": "wrong"}, ""),
    ("PUT", "/marks", {"rows": [-1], "mark": "wrong"}, "rows[0]"),
    ("PUT", "/marks", {"rows": ["1"], "mark": "wrong"}, "rows[0]"),
    ("PUT", "/marks", {"rows": [True], "mark": "wrong"}, "rows[0]"),
    ("PUT", "/marks", {"rows": [1], "mark": SCRIPT}, "mark"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "label": "eleven"}, "label"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "label": 10}, "label"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "label": 0.5}, "label"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "label": True}, "label"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "note": "x" * 1001}, "note"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "index": "other"}, "index"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "who": "boss"}, "who"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "expected": {"2": 0}}, ""),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "expected": {"01": 0}}, "expected"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "expected": {"1": -1}}, "expected"),
    ("PUT", "/marks", {"rows": [1], "mark": "wrong", "expected": {str(row): 0 for row in range(4000)}}, "expected"),
    ("DELETE", "/marks", {"rows": [1], "index": "../../etc"}, "index"),
    ("DELETE", "/marks", None, ""),
    ("POST", "/marks/undo", {"change": 1.5}, "change"),
    ("POST", "/questions", {"title": "x", "address": "javascript:alert(1)"}, "address"),
    ("POST", "/questions", {"title": "x", "address": "#a\nb"}, "address"),
    ("POST", "/questions", {"title": "x", "address": "#" + "a" * 4000}, "address"),
    ("POST", "/questions", {"title": "", "address": "#"}, "title"),
    ("GET", "/marks?mark=all", None, "mark"),
    ("GET", "/marks?rows=x", None, "rows"),
    ("GET", "/marks?k=100000", None, "k"),
    ("GET", "/marks?index=other", None, "index"),
    ("GET", "/marks?kind=wrong", None, "kind"),
    ("GET", "/marks/export?format=pickle", None, "format"),
    ("GET", "/marks/export?index=other", None, "index"),
]


def test_what_cannot_be_is_refused_by_the_name_of_its_field_and_nothing_is_kept(url: str, client: Client) -> None:
    for method, address, body, field in HOSTILE:
        response = httpx.request(method, url + address, json=body, timeout=600)
        case = f"{method} {address} {str(body)[:80]}: {response.text[:300]}"
        assert response.status_code == 422, case
        assert any(error["field"].startswith(field) for error in response.json()["errors"]) or not field, case
    assert client.marks().results == []
    assert client.questions().results == []
    assert httpx.put(f"{url}/marks", content=b" " * 70_000).status_code == 413
    assert httpx.delete(f"{url}/questions/1").status_code == 404
    assert httpx.delete(f"{url}/questions/x").status_code == 422


@pytest.mark.parametrize(
    "text", [SCRIPT, "'; DROP TABLE marks; --", "\x00", "\u202e\u0000é\U0001f600", "%s {x} \\u0000"]
)
def test_texts_are_kept_as_they_are(client: Client, text: str) -> None:
    client.mark([1], "wrong", note=text)
    assert client.marks().results[0].note == text
    assert SCRIPT not in client.marks()._repr_html_()
    assert client.save_question(text, "#<script>", note=text) == client.questions().results[0]
    for file_format in ("csv", "parquet", "rows"):
        assert client.export_marks(file_format)


def test_half_a_surrogate_pair_is_refused(url: str) -> None:
    response = httpx.put(f"{url}/marks", content=rb'{"rows": [1], "mark": "wrong", "note": "\ud800"}')
    assert response.status_code == 422


def test_a_full_disk_is_told_and_loses_nothing(client: Client, largest_file: Callable[[int], None]) -> None:
    client.mark([1], "wrong", note="kept")
    largest_file(16_000)  # less than the change takes
    for _ in range(2):
        with pytest.raises(ServiceError) as full:
            client.mark(list(range(400)), "wrong", note="x" * 1000)
        assert (full.value.status, "free some space" in full.value.detail) == (507, True)
    largest_file(resource.RLIM_INFINITY)
    assert [(mark.row, mark.note) for mark in client.marks().results] == [(1, "kept")]
    client.mark([2], "right")
    assert client.marks().rows_total == 2


def test_a_state_file_that_fails_does_not_keep_queries_from_being_answered(
    digits_index: DigitsRun, state: Path
) -> None:
    state.write_bytes(os.urandom(10_000))
    with service(digits_index, state) as url, Client(url, retries=0) as client:
        for call in (client.marks, client.questions, client.export_marks, lambda: client.mark([1], "wrong")):
            with pytest.raises(BusyError, match="restore it from a copy") as refused:
                call()
            assert (refused.value.status, str(state) in refused.value.detail) == (503, False)
        assert client.influence(query_rows=[0], k=1).results
        wait_until(lambda: httpx.get(f"{url}/readyz").is_success)
        state.unlink()
        client.mark([1], "wrong")


def test_the_examples_of_the_page_run(digits_index: DigitsRun, state: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "marks.md").read_text()
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving_when_ready(create_service(hosted, Settings(processes=0, state=state))) as url:
        names: dict[str, Any] = {}
        for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(compile(code.replace("http://127.0.0.1:8000", url), "docs/marks.md", "exec"), names)
        assert names["rows"] == []
        names["client"].close()


WITHOUT_PRIVILEGE = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write to everything")
def test_a_read_only_file_is_read_and_says_so_when_it_should_be_written(
    digits_index: DigitsRun, tmp_path: Path
) -> None:
    folder = tmp_path / "read only"
    folder.mkdir()
    state = folder / "state.sqlite"
    with service(digits_index, state) as url, Client(url) as client:
        client.mark([1], "wrong", note="kept")
    before = WITHOUT_PRIVILEGE if os.geteuid() == 0 else ()
    with ExitStack() as modes:
        for path, mode, usual in ((state, 0o444, 0o600), (folder, 0o555, 0o700)):
            path.chmod(mode)
            modes.callback(path.chmod, usual)
        flags = ("--state", str(state), "--grace-seconds", "0")
        with program(digits_index, *flags, before=before) as (_, url), Client(url, retries=0) as client:
            assert client.whoami().read_only
            assert [mark.note for mark in client.marks().results] == ["kept"]
            with pytest.raises(BusyError, match="it is read-only"):
                client.mark([2], "wrong")
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            assert client.influence(query_rows=[0], k=1).results
