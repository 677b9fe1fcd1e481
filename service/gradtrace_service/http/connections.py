"""Connections are bounded: their number, the size of a request's head, and what is read after an answer."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict
from contextlib import suppress
from http import HTTPStatus
from typing import Any, ClassVar

import h11
import psutil
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradtrace_service.http.problems import problem
from gradtrace_service.http.watched_connections import WatchedProtocol
from gradtrace_service.settings import SettingsError

MOST_BY_DEFAULT = 1024
HEAD_BYTES = 64 << 10
_MOST_DESCRIPTORS = 1 << 16  # enough, where the hard limit is infinite
_DISCARDED_BYTES = 64 << 20  # of a body that was refused: a client that goes on sending would not read the refusal
_MALFORMED = (
    f"the request is not HTTP/1.1 with one Host, or its address and headers are longer than {HEAD_BYTES:,} bytes: send "
    "long lists in the body of a POST, if the address takes one"
)
_FULL = "as many connections are open as the service has room for; send the request again later"

_log = logging.getLogger(__name__)


def http_options(max_connections: int | None) -> dict[str, Any]:
    """Arguments of uvicorn.Config, for as many connections as are asked for, or as the descriptors allow.

    Always h11: httptools has no limit for the size of heads.

    Raises:
        SettingsError: this process may not open so many files.
    """
    free = _descriptors() - psutil.Process().num_fds()
    if max_connections is not None and max_connections > free // 2:
        raise SettingsError(
            f"--max-connections {max_connections} needs {2 * max_connections} file descriptors, of which {free} are "
            "free: raise the limit (ulimit -Hn, LimitNOFILE of systemd), or give fewer"
        )
    most = max_connections or min(MOST_BY_DEFAULT, max(1, free // 2))
    # asyncio accepts as many connections as the backlog holds before any of them can be refused.
    backlog = max(1, min(2048, free // 4))
    return {"http": bounded_protocol(most), "backlog": backlog, "h11_max_incomplete_event_size": HEAD_BYTES}


def raise_descriptors() -> None:
    """Raise this process's limit of open files as far as the system allows without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # systems have limits below what they name
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _as_sent(response: Response) -> bytes:
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (
        response.status_code,
        HTTPStatus(response.status_code).phrase.encode(),
        head,
        bytes(response.body),
    )


class _BoundedProtocol(WatchedProtocol):
    """uvicorn's protocol, of which `most` connections are open at a time.

    by_last_data: the open ones, that from which data came last at the end
    """

    most: ClassVar[int]
    by_last_data: ClassVar[OrderedDict[WatchedProtocol, None]]
    malformed = _as_sent(problem(400, "bad-request", _MALFORMED, headers={"Connection": "close"}))
    full = problem(503, "busy", _FULL, headers={"Retry-After": "1", "Connection": "close"})
    _discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.by_last_data) >= self.most:
            self._make_room()
        self.by_last_data[self] = None

    def _make_room(self) -> None:
        _log.warning("%d connections are open, as many as may be", len(self.by_last_data))
        idle = next((connection for connection in self.by_last_data if connection.makes_room()), None)
        if idle is None:
            self.app = self.full
        else:
            del self.by_last_data[idle]
            idle.transport.abort()  # close would wait until everything is sent

    def connection_lost(self, exc: Exception | None) -> None:
        self.by_last_data.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self in self.by_last_data:
            self.by_last_data.move_to_end(self)
        if self.answered and self.conn.their_state is h11.SEND_BODY:
            self._discarded += len(data)
        if self._discarded > _DISCARDED_BYTES:
            self.transport.abort()
            return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self.malformed)
            self.transport.close()
        else:  # the body is malformed, and its answer has begun
            self.transport.abort()


def bounded_protocol(limit: int) -> type[H11Protocol]:
    """uvicorn's protocol, of which `limit` connections are open at a time. A further one takes the place of the one
    that has been without a request, or whose client has done nothing, the longest; else it is answered with 503."""

    class BoundedProtocol(_BoundedProtocol):
        most = limit
        by_last_data: ClassVar[OrderedDict[WatchedProtocol, None]] = OrderedDict()

    return BoundedProtocol
