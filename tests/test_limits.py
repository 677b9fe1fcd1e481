"""What a refusal costs: documents, bodies, examples, heads, connections, streams and log lines are bounded."""

from __future__ import annotations

import base64
import json
import logging
import resource
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException

from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace_client import Client, InvalidRequestError
from gradtrace_client.request_schemas import MAX_CHECKPOINTS, MAX_COLUMNS, MAX_ROWS, MAX_VALUES
from gradtrace_client.service_schemas import MAX_PROBLEMS, Problem
from gradtrace_service.answers import questions
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http import body_room, connections, request_reading, watched_connections
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.http.streams import OpenStreams
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.ops.logs import FewOfAKind
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings, SettingsError
from test_security import chunk, png_of

ASKED = {"query_rows": [3], "k": 2}
JSON = {"Content-Type": "application/json"}
MOST_BYTES = 20_000  # of a problem document
HEAD = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
Address = tuple[str, int]


def refused(url: str, body: bytes | dict[str, Any], status: int = 422, path: str = "/influence") -> Problem:
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    response = httpx.post(url + path, content=content, headers=JSON, timeout=120)
    assert response.status_code == status, response.text[:1000]
    assert len(response.content) < MOST_BYTES
    return Problem.model_validate_json(response.content)


def address(url: str) -> Address:
    return httpx.URL(url).host, httpx.URL(url).port or 0


def exchanged(url: str, request: bytes) -> bytes:
    """What is answered to these bytes until the connection is closed."""
    heard = b""
    with socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(request)
        while piece := connection.recv(1 << 20):
            heard += piece
    return heard


LONG_LISTS: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"filter": {"labels": [[]] * 100_000}}, "filter.labels[0]"),
    "too many labels": ({"filter": {"labels": ["a"] * (MAX_VALUES + 1)}}, "filter.labels"),
    "rows": ({"filter": {"rows": [""] * 100_000}}, "filter.rows[0]"),
    "too many rows": ({"filter": {"exclude_rows": [0] * (MAX_ROWS + 1)}}, "filter.exclude_rows"),
    "values of a column": ({"filter": {"where": {"loss": {"in": [[]] * 100_000}}}}, "filter.where.loss.in[0]"),
    "columns": ({"filter": {"where": {str(at): {} for at in range(MAX_COLUMNS + 1)}}}, "filter.where"),
    "include": ({"include": [""] * 100_000}, "include"),
    "checkpoints": ({"checkpoints": [0] * 100_000}, "checkpoints[0]"),
    "too many checkpoints": ({"checkpoints": ["a"] * (MAX_CHECKPOINTS + 1)}, "checkpoints"),
    "queries": ({"query_rows": [""] * 100_000}, "query_rows"),
    "unknown fields": ({str(at): 1 for at in range(50_000)}, ""),
    "unknown fields of a filter": ({"filter": {str(at): 1 for at in range(50_000)}}, "filter"),
}


@pytest.mark.parametrize("case", LONG_LISTS)
def test_a_list_of_wrong_elements_is_refused_by_one(url: str, case: str) -> None:
    wrong, field = LONG_LISTS[case]
    problem = refused(url, ASKED | wrong)
    assert [error.field for error in problem.errors] == [field]


def test_ten_problems_are_named_and_the_others_counted(url: str) -> None:
    problem = refused(url, ASKED | {f"field {at}": 1 for at in range(50)})
    assert [error.field for error in problem.errors] == [*(f"field {at}" for at in range(MAX_PROBLEMS)), ""]
    assert problem.errors[-1].detail == "40 more problems are not named"
    with Client(url) as client, pytest.raises(InvalidRequestError) as not_sent:
        client.influence(query_rows=[""] * 50)  # checked before it is sent
    assert len(not_sent.value.errors) == MAX_PROBLEMS + 1


@pytest.mark.parametrize(
    "place",
    [
        lambda text: ASKED | {text: 1},
        lambda text: ASKED | {"method": text},
        lambda text: ASKED | {"index": text},
        lambda text: ASKED | {"checkpoints": [text]},
        lambda text: ASKED | {"filter": {"where": {text: {"min": 1}}}},
        lambda text: ASKED | {"filter": {"labels": [text]}},
        lambda text: {"example": {text: 1}},
        lambda text: {"example": {"image": [[0] * 8] * 8, "label": text}},
        lambda text: {"example": {"image": text}},
    ],
)
@pytest.mark.parametrize("length", [250, 3_000_000])
def test_a_long_name_is_not_repeated_as_a_whole(url: str, place: Callable[[str], Any], length: int) -> None:
    problem = refused(url, place("ž" * length))
    assert "ž" * 251 not in problem.model_dump_json()


def test_unknown_names_of_250_characters_are_told_the_known_ones(url: str) -> None:
    problem = refused(url, ASKED | {"checkpoints": ["c" * 250]})
    assert "step-" in problem.errors[0].detail


@pytest.mark.parametrize(
    ("field", "value"),
    [("damping", True), ("damping", "3"), ("damping", "inf"), ("segments", "2"), ("segments", True), ("k", "3"),
     ("k", True), ("rescore", "yes"), ("rescore", 1), ("query_rows", ["3"]), ("query_rows", [True])],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(url: str, field: str, value: Any) -> None:
    problem = refused(url, ASKED | {field: value})
    assert problem.errors[0].field.startswith(field)
    assert refused(url, ASKED | {"filter": {"correct_only": "no"}}).errors[0].field == "filter.correct_only"
    assert httpx.get(f"{url}/self-influence", params={"damping": "0.5", "method": "influence"}).status_code == 200


def test_a_body_holds_so_many_values_at_most(url: str) -> None:
    for body in (b"[" + b"0," * (body_room.MAX_VALUES + 1) + b"0]", b"[" + b"[]," * body_room.MAX_CONTAINERS + b"0]",
                 b"{" + b'"":0,' * body_room.MAX_CONTAINERS + b'"":0}'):  # fmt: skip
        assert "values" in refused(url, body, 413).detail
    rows = [row % 400 for row in range(MAX_ROWS)]
    answer = httpx.post(f"{url}/influence", json=ASKED | {"filter": {"rows": rows}}, timeout=120)
    assert answer.status_code == 200, answer.text[:1000]


def test_each_address_takes_what_its_bodies_can_mean(digits_index: DigitsRun) -> None:
    body = b'{"unknown": "' + b" " * body_room.SMALL_BYTES + b'"}'
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving(create_service(hosted, Settings(processes=0))) as url:
        assert refused(url, body).errors[0].field == "unknown"
        assert "65,536 bytes" in refused(url, body, 413, path="/reindex").detail


def refused_beside(
    held: ExitStack, url: str, arriving: list[bytes], ask: Callable[[], httpx.Response]
) -> httpx.Response:
    """The refusal of a request beside others that are still arriving. Asked before these are read, it is answered, and
    one of them may be refused in its place: they are then sent again, and given longer."""
    for doubling in range(10):
        for sent in arriving:
            connection = held.enter_context(closing(socket.create_connection(address(url), timeout=60)))
            connection.sendall(sent)
        time.sleep(0.1 * 2**doubling)
        if (answer := ask()).status_code == 503:
            return answer
        held.close()
    raise AssertionError("no request was refused")


def test_bodies_that_are_held_leave_room(digits_index: DigitsRun) -> None:
    """Beside a body that is still arriving, a large one is refused, and a small one is not."""
    settings = Settings(max_body_mb=1)
    head = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    body = b'"' + b"," * ((1 << 20) - 100)  # a value takes 32 bytes: it fills what one caller may hold
    with serving_when_ready(create_app(digits_index.open(), settings)) as url, ExitStack() as held:
        large = {"example": {"image": " " * 900_000}}
        assert httpx.post(f"{url}/influence", json=large).status_code == 422
        arriving = head % (1 << 20) + body
        busy = refused_beside(held, url, [arriving], lambda: httpx.post(f"{url}/influence", json=large))
        assert busy.headers["retry-after"]
        assert Problem.model_validate_json(busy.content).type == "urn:gradtrace:problem:busy"
        assert httpx.post(f"{url}/influence", json=ASKED).status_code == 200
        held.close()
        wait_until(lambda: httpx.post(f"{url}/influence", json=large).status_code == 422)


def test_one_caller_leaves_room_for_the_bodies_of_others(
    digits_index: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reading, "PATIENCE_SECONDS", 600.0)
    keys = tmp_path / "keys"
    held_key, other_key = add_key(keys, "holds", [Scope.query]), add_key(keys, "asks", [Scope.query])
    head = b"POST /influence HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
    large = {"example": {"image": " " * 900_000}}
    with serving_when_ready(create_app(digits_index.open(), Settings(api_key_file=keys))) as url, ExitStack() as held:

        def asked(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.post(f"{url}/influence", json=large, headers=headers, timeout=120)

        arriving = head % (held_key.encode(), 16 << 20) + b" " * ((16 << 20) - 1000)
        refused_beside(held, url, [arriving] * 3, lambda: asked(held_key))
        assert asked(other_key).status_code == 422


@pytest.mark.parametrize("max_bytes", [1, 1 << 20, 16 << 20, 1 << 30])
def test_any_body_finds_room(max_bytes: int) -> None:
    room, largest = body_room.BodyRoom(max_bytes, frozenset(["/influence"])), body_room.Contents("key a")
    values = min(max_bytes, body_room.MAX_VALUES)
    room.take(largest, b"," * values + bytes(min(max_bytes, 64 << 20) - values))
    room.give_back(largest)


def test_profiles_of_many_images_are_not_unpacked(url: str) -> None:
    plain = base64.b64decode(png_of(8, 8, zlib.compress(bytes(72))))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20), 9))
    text = base64.b64encode(plain[:33] + profile * 90 + plain[33:]).decode()
    answer = httpx.post(f"{url}/influence", json={"examples": [{"image": text}] * 100, "k": 1}, timeout=120)
    assert answer.status_code == 200


def test_examples_that_take_long_to_read_are_refused_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "_READING_SECONDS", -1.0)
    problem = refused(url, {"examples": [{"image": [[0] * 8] * 8}] * 3})
    assert "fewer at a time" in problem.errors[0].detail


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP\r\nHost: x\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nA\0: b\r\n\r\n",
        b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (1 << 20),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 100_000,
    ],
)
def test_a_malformed_or_long_head_is_answered_with_400(
    url: str, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        head, _, document = exchanged(url, request_).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert "Host" in Problem.model_validate_json(document).detail
    except ConnectionError:  # hung up before all of a long head was sent
        assert len(request_) > connections.HEAD_BYTES
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "FOO"])
def test_other_methods_are_refused(url: str, method: str) -> None:
    answer = exchanged(url, f"{method} /index HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 405")


def test_a_body_that_breaks_after_the_answer_ends_its_connection_alone(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(address(url), timeout=60) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        connection.sendall(b"what?!\r\n")
        while connection.recv(1 << 16):
            pass
    assert not [record for record in caplog.records if record.exc_info]


def test_no_redirect_leads_to_the_host_that_is_named(url: str) -> None:
    for path in ("/", "/influence/", "/index/", "/docs/"):
        answer = httpx.get(url + path, headers={"Host": "evil.example"})
        assert "evil" not in answer.headers.get("location", "")
    assert httpx.get(f"{url}/index/").status_code == 404


@pytest.fixture
def narrow(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service that keeps four connections."""
    monkeypatch.setattr(connections, "MOST_BY_DEFAULT", 4)
    with serving(create_app(digits_index.open())) as url:
        yield url


def test_at_the_limit_the_idlest_connection_makes_room(narrow: str) -> None:
    with ExitStack() as opened:
        idle = [opened.enter_context(closing(socket.create_connection(address(narrow)))) for _ in range(20)]
        assert httpx.get(f"{narrow}/healthz").status_code == 200
        idle[0].settimeout(60)
        assert idle[0].recv(1) == b""


def test_where_all_connections_are_busy_a_further_one_is_told(narrow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_connections, "STALLED_SECONDS", 600.0)
    begun = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with ExitStack() as opened:
        refusal = refused_beside(opened, narrow, [begun] * 4, lambda: httpx.get(f"{narrow}/healthz"))
        assert refusal.headers["retry-after"]
        assert refusal.headers["connection"] == "close"
        assert "connections" in Problem.model_validate_json(refusal.content).detail
    wait_until(lambda: httpx.get(f"{narrow}/healthz").status_code == 200)


BUNDLE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("content", [BUNDLE * 9, HEAD % 100 + b"{"], ids=["unread", "unfinished"])
def test_clients_that_do_nothing_make_room(narrow: str, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(watched_connections, "STALLED_SECONDS", 0.2)
    monkeypatch.setattr(request_reading, "PATIENCE_SECONDS", 600.0)
    with ExitStack() as opened:
        for _ in range(4):
            connection = opened.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address(narrow))
            connection.sendall(content)
        time.sleep(1)  # until they are being answered
        wait_until(lambda: httpx.get(f"{narrow}/healthz").status_code == 200, 60)


def test_no_more_connections_are_promised_than_files_can_be_opened() -> None:
    options = connections.http_options(None)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert options["backlog"] < soft
    with pytest.raises(SettingsError, match="--max-connections"):
        connections.http_options(1 << 20)


def test_streams_are_counted_by_caller_and_in_all() -> None:
    streams = OpenStreams()
    for _ in range(8):
        streams.open("key a")
    with pytest.raises(HTTPException, match="429"):
        streams.open("key a")
    for number in range(56):
        streams.open(f"key {number}")
    with pytest.raises(HTTPException, match="503"):
        streams.open("key b")
    streams.close("key a")
    streams.open("key b")


def test_streams_are_counted_while_they_are_open(digits_index: DigitsRun, tmp_path: Path) -> None:
    """An ended job's stream ends at once, and gives its place back; so does one of a job that does not exist."""
    index = Path(shutil.copytree(digits_index.index, tmp_path / "index"))
    hosted = [Hosted("digits", index, digits_index.task, [digits_index.checkpoints])]
    with serving_when_ready(create_service(hosted, Settings(processes=0))) as url:
        job = httpx.post(f"{url}/reindex", json={"roll_back_to": 9}).json()["id"]
        wait_until(lambda: httpx.get(f"{url}/jobs/{job}").json()["state"] != "running")
        for _ in range(10):
            assert httpx.get(f"{url}/jobs/{job}/events").status_code == 200
            assert httpx.get(f"{url}/jobs/none/events").status_code == 404


def test_long_addresses_and_many_parameters_are_refused_shortly(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/" + "a" * 50_000, "/index?" + "&".join(f"a{at}=1" for at in range(6_000)), "/jobs/" + "a" * 9_000):
        answer = httpx.get(url + path)
        assert answer.status_code in (404, 422)
        assert len(answer.content) < MOST_BYTES
    assert max(len(record.getMessage()) for record in caplog.records if record.name.startswith("gradtrace")) < 1_000


def test_few_lines_of_a_kind_are_logged_a_second(tmp_path: Path) -> None:
    few, lines = FewOfAKind(), list[str]()
    log, handler = logging.Logger("any"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(few)
    log.addHandler(handler)
    for number in range(1000):
        log.error("one kind, %d", number)
        log.info("answered", extra={"status": 200})
    kinds = [line for line in lines if line.startswith("one kind")]
    assert lines.count("answered") == 1000
    assert 20 <= len(kinds) < 1000
    log.error("another kind")
    assert lines[-1] == "another kind"
