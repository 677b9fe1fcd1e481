"""Clients that keep a connection and do nothing with it, over real sockets."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvicorn.protocols.http.auto

from conftest import DigitsRun, wait_until
from gradtrace_service.app import create_app
from gradtrace_service.http import body_limit
from gradtrace_service.server import serving

HEAD = b"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BODY = json.dumps({"query_rows": [0], "k": 2}).encode()


@pytest.fixture(params=["h11_impl.H11Protocol", "httptools_impl.HttpToolsProtocol"])
def address(
    request: pytest.FixtureRequest, digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, int]]:
    """Of a service that waits a second for its clients, with either of uvicorn's readers of HTTP."""
    module, name = request.param.split(".")
    reader = getattr(pytest.importorskip(f"uvicorn.protocols.http.{module}", exc_type=ImportError), name)
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", reader)
    monkeypatch.setattr(body_limit, "PATIENCE_SECONDS", 1.0)
    with serving(create_app(digits_index.open())) as url:
        yield httpx.URL(url).host, httpx.URL(url).port or 0


def trickle(address: tuple[str, int], content: bytes, pause: float = 0.2, seconds: float = 60) -> bytes:
    """Send a byte now and then; what the service answers before it hangs up."""
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


@pytest.mark.parametrize("content", [b"", HEAD], ids=["silent", "head"])
def test_no_whole_head_in_time_is_cut_off(address: tuple[str, int], content: bytes) -> None:
    assert trickle(address, content) == b""


def test_a_second_head_is_waited_for_no_longer(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(HEAD % len(BODY) + BODY)
        assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /")
        read_to_the_end(connection)


def test_no_whole_body_in_time_is_told(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(HEAD % 1000 + BODY)
        answer = read_to_the_end(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer
    assert b"the body takes too long to arrive" in answer


def test_a_slow_body_that_arrives_in_time_is_answered(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limit, "PATIENCE_SECONDS", 60.0)
    with socket.create_connection(address, timeout=60) as connection:
        for part in (HEAD % len(BODY), BODY[:9], BODY[9:]):
            connection.sendall(part)
            time.sleep(0.3)
        assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_is_cut_off(address: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    many = json.dumps({"query_rows": list(range(60)), "k": 400}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(address)
        connection.sendall(HEAD % len(many) + many)
        wait_until(lambda: "cut off a client" in caplog.text)
        heard = read_to_the_end(connection)
    announced = re.search(rb"content-length: (\d+)", heard)
    assert announced is not None
    assert len(heard) < int(announced[1])
    assert httpx.get(f"http://{address[0]}:{address[1]}/healthz").status_code == 200
