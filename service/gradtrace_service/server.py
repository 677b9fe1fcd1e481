"""Run the service: in the foreground, or on a thread beside other work."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from gradtrace_service.app import drain, end_streams
from gradtrace_service.http.connections import http_options, raise_descriptors
from gradtrace_service.listeners import deaf
from gradtrace_service.ops.logs import log_config
from gradtrace_service.settings import Settings, SettingsError

_KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs, else they send into connections just closed
_HUNG_SECONDS = 5  # from the moment when nothing new is accepted to the end
_LAST_REQUESTS_SECONDS = 0.3  # in which connections that are just being made send their requests


def refuse_public(host: str) -> None:
    """Raises SettingsError for an address that other machines reach, or one that does not exist."""
    if not all(ipaddress.ip_address(address[0]).is_loopback for *_, address in _addresses(host, 0)):
        raise SettingsError(
            f"{host} is reached from other machines, and everybody may ask for training data there; make keys by "
            "`gradtrace key new` and give --api-key-file, or listen on 127.0.0.1, or say --insecure"
        )


def refuse_taken(host: str, port: int) -> None:
    """Check that the service can listen there, before an index is loaded.

    Raises:
        SettingsError: another program has the port, or this one may not have it, or this machine does not have the
            address.
    """
    addresses = _addresses(host, port)
    failures = [error for address in addresses if (error := _binding_error(*address)) is not None]
    taken = [error for error in failures if error.errno in (errno.EADDRINUSE, errno.EACCES)]
    if taken or len(failures) == len(addresses):  # one of a name's addresses may be unavailable here, such as IPv6
        error = (taken or failures)[0]
        remedy = _REMEDIES.get(error.errno or 0, "give another --host or --port")
        raise SettingsError(f"cannot listen on {host}, port {port}: {error.strerror}; {remedy}") from error


def refuse_too_few_descriptors(max_connections: int | None) -> None:
    """Raises SettingsError as `http_options`, before an index is loaded."""
    raise_descriptors()
    http_options(max_connections)


_REMEDIES = {
    errno.EADDRINUSE: "another program listens there, perhaps another `gradtrace serve`: end it, or give another "
    "--port (0 takes a free one)",
    errno.EACCES: "ports below 1024 are for the system's administrator: give another --port, such as 8000",
    errno.EADDRNOTAVAIL: "give an address of this machine by --host: 127.0.0.1, or 0.0.0.0 for all",
}


def _binding_error(family: int, kind: int, protocol: int, _: str, address: Any) -> OSError | None:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _addresses(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--host {host} is not an address or a name of this machine ({error})") from error


def answer_local_names_alone(app: FastAPI, host: str) -> None:
    """Without keys, refuse foreign Host headers (DNS rebinding)."""
    names = [host, "localhost", "127.0.0.1", "[::1]"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)


def serve_until_told(app: FastAPI, settings: Settings, listener: socket.socket | None = None) -> None:
    """Serve the app until SIGTERM or Ctrl-C, and then until all accepted requests are answered.

    listener: one that others have open, too, in place of the settings' host and port

    Ends the program with status 1 if it could not start, if its thread hangs, or if requests had to be abandoned.

    Raises:
        SettingsError: as `http_options`. The workers are closed then, too.
    """
    try:
        raise_descriptors()
        server = _DrainingServer(_server_config(app, settings), app, settings)
        with suppress(KeyboardInterrupt):
            server.run(None if listener is None else [listener])
    finally:
        app.state.engine.close()  # also where it could not start, or a second signal ended it at once
    if not server.started:  # the log says why
        sys.exit(1)
    if app.state.engine.computing:  # the interpreter would wait for a thread that hangs
        os._exit(1)


def _server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_config=log_config(settings),
        server_header=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        **http_options(settings.max_connections),
    )


class _DrainingServer(uvicorn.Server):
    """Ends without a failed request: answers all the while, until the process has ended.

    After the signal, requests are answered for `grace_seconds`, and every answer closes its connection, so that load
    balancers and clients go elsewhere. Then new requests are refused with 503, and accepted ones are answered.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings) -> None:
        super().__init__(config)
        self._app, self._settings = app, settings
        self._held: list[socket.socket] = []  # until the process ends
        self._hung_ticks = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, and a second one ends at once."""
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)
        self._app.state.engine.leaving = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Whether to end: also when the only worker hangs, after a while in which it may
        prove to be slow."""
        engine = self._app.state.engine
        self._hung_ticks = self._hung_ticks + 1 if engine.hung else 0
        return await super().on_tick(counter) or self._hung_ticks > 10 * _HUNG_SECONDS

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once the main loop has ended."""
        engine = self._app.state.engine
        engine.leaving = True
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        self.config.timeout_graceful_shutdown = 1  # to send the last answers
        if sockets:  # connections wait in it for whoever is started next
            for server in self.servers:
                server.close()
        if not engine.hung:
            await self._until(asyncio.sleep(self._settings.grace_seconds), self._settings.grace_seconds)
            ends = time.monotonic() + self._settings.drain_seconds
            await self._until(drain(self._app), self._settings.drain_seconds)
            self.config.timeout_graceful_shutdown = max(1, int(ends - time.monotonic()))
        if not sockets:
            await self._stop_listening()
        await super().shutdown(sockets)

    async def _until(self, done: Coroutine[Any, Any, None], seconds: float) -> None:
        """Until it is done, the time is over, or a second signal ends everything."""
        ends, waiting = time.monotonic() + seconds, asyncio.ensure_future(done)
        while not (waiting.done() or self.force_exit) and time.monotonic() < ends:
            await asyncio.wait([waiting], timeout=0.1)

    async def _stop_listening(self) -> None:
        """Take no new connection, and answer those that are there.

        A listener that is closed resets the connections that it has not accepted yet. So let no more come in: what
        knocks now is not heard, knocks again after a second, and then finds whoever listens next, or nobody.
        """
        for listener in (listener for server in self.servers for listener in server.sockets):
            with suppress(OSError):  # not Linux
                self._held.append(deaf(listener))
        await asyncio.sleep(_LAST_REQUESTS_SECONDS)


class _StreamEndingServer(uvicorn.Server):
    """Ends also where somebody follows events."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await end_streams(self._app)
        await super().shutdown(sockets)


@contextmanager
def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve the app on a thread until the block is left. Yields its address; port 0 takes a free one.

    Raises:
        OSError: the service cannot listen there.
    """
    listener = socket.create_server((host, port))
    # Connections inherit it. asyncio sets it itself only on sockets made with an explicit protocol, which this one is
    # not; without it every answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(app, log_level="warning", server_header=False, ws="none", **http_options(None))
    server = _StreamEndingServer(config, app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="gradtrace-http")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
