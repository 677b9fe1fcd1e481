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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from gradtrace_service.app import drain
from gradtrace_service.http.connections import http_options, raise_descriptors
from gradtrace_service.ops.logs import log_config
from gradtrace_service.settings import Settings, SettingsError

_KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs, else they send into connections just closed


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


def serve_until_told(app: FastAPI, settings: Settings) -> None:
    """Serve the app until SIGTERM or Ctrl-C, and then until all accepted requests are answered."""
    raise_descriptors()
    config = uvicorn.Config(
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
    server = _DrainingServer(config, app, settings.drain_seconds)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:  # the log says why
        sys.exit(1)
    if app.state.engine.computing:  # the interpreter would wait for a thread that hangs
        os._exit(1)


class _DrainingServer(uvicorn.Server):
    """Listens on while the last answers are computed: new requests, and /readyz, are answered with 503."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, seconds: int) -> None:
        super().__init__(config)
        self._app, self._seconds = app, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once should_exit is set; a second Ctrl-C sets force_exit."""
        ends = time.monotonic() + self._seconds
        draining = asyncio.ensure_future(drain(self._app))
        while not (draining.done() or self.force_exit) and time.monotonic() < ends:
            await asyncio.wait([draining], timeout=0.1)
        self.config.timeout_graceful_shutdown = max(1, int(ends - time.monotonic()))  # to send the answers
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
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", server_header=False, ws="none", **http_options(None))
    )
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
