"""Clients that keep a connection and do nothing with it, over real sockets: before the service, and before a proxy."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from conftest import DigitsRun, wait_until
from gradtrace_service.app import create_app
from gradtrace_service.http import request_reading, watched_connections
from gradtrace_service.server import serving

HEAD = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BODY = json.dumps({"query_rows": [0], "k": 2}).encode()
PROXY = Path(__file__).parents[1] / "docker" / "nginx.conf"

Address = tuple[str, int]


@pytest.fixture
def address(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """Of a service that waits a second for bodies."""
    monkeypatch.setattr(request_reading, "PATIENCE_SECONDS", 1.0)
    with serving(create_app(digits_index.open())) as url:
        yield httpx.URL(url).host, httpx.URL(url).port or 0


@pytest.fixture
def proxy(digits_index: DigitsRun, tmp_path: Path) -> Iterator[Address]:
    """Of docker/nginx.conf before a service, with a second where it has 20."""
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with serving(create_app(digits_index.open())) as url:
        text = PROXY.read_text().replace("127.0.0.1:8000", url.removeprefix("http://"))
        text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(" 20s;", " 1s;")
        (tmp_path / "nginx.conf").write_text(text.replace("/tmp/", f"{tmp_path}/"))
        with subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: connects(("127.0.0.1", port)))
                yield "127.0.0.1", port
            finally:
                process.terminate()


def connects(address: Address) -> bool:
    with suppress(ConnectionError):
        socket.create_connection(address).close()
        return True
    return False


def trickle(address: Address, content: bytes, pause: float = 0.2, seconds: float = 60) -> bytes:
    """Send a byte now and then; what is answered before the other side hangs up."""
    heard, ends = b"", time.monotonic() + seconds
    with socket.create_connection(address, timeout=pause) as connection:
        for place in range(len(content) + int(seconds / pause)):
            assert time.monotonic() < ends, f"not cut off; it heard {heard!r}"
            try:
                connection.sendall(content[place : place + 1])
                piece = connection.recv(1 << 16)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not piece:
                break
            heard += piece
    return heard


def read_to_the_end(connection: socket.socket) -> bytes:
    heard = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            heard += piece
    return heard


def test_no_whole_body_in_time_is_told(address: Address) -> None:
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(HEAD % 1000 + BODY)
        answer = read_to_the_end(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer
    assert b"the body takes too long to arrive" in answer


def test_a_slow_body_that_arrives_in_time_is_answered(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_reading, "PATIENCE_SECONDS", 60.0)
    with socket.create_connection(address, timeout=60) as connection:
        for part in (HEAD % len(BODY), BODY[:9], BODY[9:]):
            connection.sendall(part)
            time.sleep(0.3)
        assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200")


def test_many_bytes_at_once_buy_no_time(address: Address) -> None:
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(HEAD % (8 << 20) + b" " * (4 << 20))
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_goes_on_arriving_is_not_waited_for_without_end(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reading, "PATIENCE_SECONDS", 600.0)
    monkeypatch.setattr(request_reading, "_LONGEST_SECONDS", 1.0)
    assert trickle(address, HEAD % 60_000 + b" " * 60_000, pause=0.01).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("content", [b"GET", HEAD[:-4], b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /"])
def test_no_whole_head_in_time_is_cut_off(address: Address, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(watched_connections, "PATIENCE_SECONDS", 1.0)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(content)
        assert read_to_the_end(connection).count(b"HTTP/1.1") == content.count(b"\r\n\r\n")


def is_held(address: Address, connection: socket.socket) -> bool:
    """Whether the service at the address keeps its end open."""
    server, here = [psutil.CONN_ESTABLISHED, address[1]], connection.getsockname()[1]
    sockets = psutil.Process().net_connections("tcp")
    return any([item.status, item.laddr[1]] == server and item.raddr[1] == here for item in sockets)


@contextmanager
def asking_for_much(address: Address) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 9)
        yield connection


def test_a_client_that_reads_nothing_is_cut_off(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_connections, "PATIENCE_SECONDS", 1.0)
    with asking_for_much(address) as connection:
        wait_until(lambda: not is_held(address, connection), 60)


def test_a_client_that_reads_a_little_now_and_then_is_cut_off(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_connections, "READING_SECONDS", 2.0)
    monkeypatch.setattr(watched_connections, "_BYTES_PER_SECOND", 1 << 30)

    def reads_and_is_cut_off() -> bool:
        with suppress(ConnectionError):
            connection.recv(512)
        return not is_held(address, connection)

    with asking_for_much(address) as connection:
        wait_until(reads_and_is_cut_off, 60)


def test_a_client_that_reads_slowly_gets_its_whole_answer(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_connections, "READING_SECONDS", 1.0)
    body = json.dumps({"query_rows": list(range(60)), "k": 400}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(HEAD % len(body) + body)
        heard = connection.recv(1 << 16)
        time.sleep(3)  # its size buys time beyond the second
        announced = re.search(rb"content-length: (\d+)", heard, re.IGNORECASE)
        assert announced is not None
        total = heard.index(b"\r\n\r\n") + 4 + int(announced[1])
        while len(heard) < total and (piece := connection.recv(1 << 16)):
            heard += piece
    assert len(heard) == total


def test_the_proxy_passes_questions_and_answers_on(proxy: Address) -> None:
    url = "http://{}:{}".format(*proxy)
    answer = httpx.post(f"{url}/influence", json={"query_rows": [0], "k": 2}, headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    assert len(answer.json()["results"][0]["proponents"]) == 2
    assert httpx.post(f"{url}/influence", json={"k": 0}).json()["type"] == "urn:gradtrace:problem:invalid-request"


@pytest.mark.parametrize("content", [b"", HEAD], ids=["silent", "head"])
def test_no_whole_head_in_time_is_cut_off_by_the_proxy(proxy: Address, content: bytes) -> None:
    assert b"200" not in trickle(proxy, content)


def test_a_client_that_reads_nothing_is_cut_off_by_the_proxy(proxy: Address) -> None:
    many = json.dumps({"query_rows": list(range(60)), "k": 400}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(proxy)
        connection.sendall(HEAD % len(many) + many)
        connection.recv(1)  # the answer has begun
        time.sleep(4)
        heard = read_to_the_end(connection)
    announced = re.search(rb"content-length: (\d+)", heard, re.IGNORECASE)
    assert announced is not None
    assert len(heard) < int(announced[1])
    assert httpx.get("http://{}:{}/healthz".format(*proxy)).status_code == 200
