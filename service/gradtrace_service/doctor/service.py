"""Checks of a service, from a client's side: whether it answers, whom, how fast, and with which headers."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from importlib.metadata import version

import httpx
import numpy as np

from gradtrace.errors import QueryError
from gradtrace_client.schemas import IndexDetails
from gradtrace_client.service_schemas import VERSION_HEADER, Indexes, Problem
from gradtrace_service.doctor.findings import Says, listed

_TIMEOUT = httpx.Timeout(70.0, connect=10.0)  # longer than the service's own deadline
_CERTIFICATE_DAYS = 14.0
_CLOCK_SECONDS = 5.0
_QUERIES = 20
_SLOW_SECONDS = 1.0
_FOREIGN_HOST = "doctor.invalid"  # a name that no resolver knows
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class Service:
    """A service and the key to ask it with.

    key: None: as anybody

    Raises:
        QueryError: the address or the key is none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        key = None if key is None else key.strip()  # one that was read from a file ends with a newline
        if key is not None and not (key.isascii() and key.isprintable()):  # httpx would show it in its error
            raise QueryError("the API key has characters that no header may hold; copy it again from its source")
        try:
            self.url = httpx.URL(url)
            self.anybody = httpx.Client(base_url=url, timeout=_TIMEOUT)
        except httpx.InvalidURL as error:
            raise QueryError(
                f"{url} is not an address ({error}); write it as http://HOST:PORT or https://HOST"
            ) from None
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, timeout=_TIMEOUT, headers=headers)
        self.has_key = key is not None

    def close(self) -> None:
        self.anybody.close()
        self.http.close()

    @property
    def asks_for_keys(self) -> bool:
        return self.anybody.get("/indexes").status_code == 401

    def unreachable(self) -> str | None:
        """Why there is nothing to check; None: a service is there."""
        try:
            answer = self.anybody.get("/healthz")
        except httpx.HTTPError as error:
            return f"no answer from {self.url} ({type(error).__name__}: {error}); is `gradtrace serve` running there?"
        if VERSION_HEADER not in answer.headers:
            return (
                f"what answers at {self.url} is not a Gradtrace service, or a proxy removes the header "
                f"{VERSION_HEADER}: /healthz gave {answer.status_code}; check host and port"
            )
        return None


def health(service: Service) -> Says:
    """Whether the process lives, and queries are answered."""
    for path in ("/healthz", "/readyz"):
        answer = service.anybody.get(path)
        if answer.is_success:
            yield "ok", f"{path} {answer.status_code} after {answer.elapsed.total_seconds() * 1e3:.0f} ms"
        else:
            yield "problem", f"{path} {answer.status_code}: {_detail(answer)}"


def transport(service: Service) -> Says:
    """Encryption, and for how long the certificate is valid."""
    if service.url.scheme != "https":
        if _is_local(service.url.host):
            yield "ok", "plain HTTP, to this machine"
        else:
            yield (
                "warning",
                "plain HTTP: keys and training data can be read on their way; put a proxy with TLS before it",
            )
        return
    address = (service.url.host, service.url.port or 443)
    with (
        socket.create_connection(address, timeout=10) as plain,
        httpx.create_ssl_context().wrap_socket(plain, server_hostname=service.url.host) as secure,
    ):
        certificate, protocol = secure.getpeercert(), secure.version()
    end = str((certificate or {})["notAfter"])
    days = (ssl.cert_time_to_seconds(end) - time.time()) / 86400
    text = f"{protocol}; the certificate ends in {days:.0f} days, on {end}"
    if days > _CERTIFICATE_DAYS:
        yield "ok", text
    else:
        yield "warning", f"{text}: renew it"


def versions(service: Service) -> Says:
    """Client and service must have the same major version."""
    theirs, ours = service.anybody.get("/healthz").headers[VERSION_HEADER], version("gradtrace-client")
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        yield "problem", f"the service is {theirs}, the client here {ours}: pip install 'gradtrace-client=={theirs}'"
    elif theirs != ours:
        yield "warning", f"the service is {theirs}, the client here {ours}: one may lack what the other knows"
    else:
        yield "ok", f"{theirs}, as the client's here"


def clock(service: Service) -> Says:
    """The service's clock, by the Date of its answers, beside this machine's."""
    answer = service.anybody.get("/healthz")
    ahead = parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
    if abs(ahead) > _CLOCK_SECONDS:
        yield "warning", f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: set both by NTP"
    else:
        yield "ok", f"within {_CLOCK_SECONDS:.0f} s of this machine's"


def keys(service: Service) -> Says:
    """Whether strangers are refused, and what the key is good for."""
    if not service.asks_for_keys:
        if _is_local(service.url.host):
            yield "ok", "none are asked for; give --api-key-file where others than this machine's users reach it"
        else:
            yield "problem", "none are asked for: whoever reaches the service sees training data; give --api-key-file"
        return
    yield "ok", "who has none is refused"
    if not service.has_key:
        yield "warning", "none was given, so that little can be checked: give --api-key or set GRADTRACE_API_KEY"
        return
    statuses = {"query": service.http.get("/indexes").status_code, "admin": service.http.get("/jobs").status_code}
    scopes = [scope for scope, status in statuses.items() if status not in (401, 403)]
    if 401 in statuses.values():
        yield "problem", "the given one is not known to the service: `gradtrace key new` makes one"
    elif "query" not in scopes:
        yield "warning", "the given one lacks the scope query, so that little can be checked"
    else:
        yield "ok", f"the given one has {' and '.join(scopes)}"


def indexes(service: Service) -> Says:
    """The indexes that can be asked."""
    answer = service.http.get("/indexes")
    if not answer.is_success:
        yield "problem", f"/indexes {answer.status_code}: {_detail(answer)}"
        return
    for index in Indexes.model_validate_json(answer.content).indexes:
        name = index.name or "the only one"
        if index.generation is None:
            yield "problem", f"{name}: its manifest cannot be read; `gradtrace doctor DIRECTORY` says why"
            continue
        loaded = "loaded" if index.loaded else "opened at its first query"
        yield "ok", f"{name}: generation {index.generation}, {index.rows:,} rows, {loaded}"


def latency(service: Service) -> Says:
    """Some queries, one after the other, by rows of the default index's query data or, without, its training data."""
    details = service.http.get("/index")
    if not details.is_success:
        yield "problem", f"/index {details.status_code}: {_detail(details)}"
        return
    index = IndexDetails.model_validate_json(details.content)
    field, rows = ("query_rows", index.query_rows) if index.query_rows else ("train_rows", index.rows)
    bodies = [{field: [query % rows], "k": min(10, index.rows), "include": []} for query in range(_QUERIES)]
    answers = [service.http.post("/influence", json=body) for body in bodies]
    for refusal in {_detail(answer) for answer in answers if not answer.is_success}:
        yield "problem", f"of {_QUERIES} queries some are refused: {refusal}"
    yield from _times([answer.elapsed.total_seconds() for answer in answers if answer.is_success])


def headers(service: Service) -> Says:
    """What keeps browsers from misusing an answer; a proxy may remove it."""
    given = service.http.get("/indexes").headers
    missing = [name for name, value in _HEADERS.items() if value not in given.get(name, "")]
    if missing:
        yield "warning", f"{listed(missing)} are not as the service sends them: let the proxy pass them on"
    else:
        yield "ok", listed(_HEADERS)


def host(service: Service) -> Says:
    """Whether a page of another name, which its owner points here, is answered (DNS rebinding), and redirects by it."""
    named = {"Host": _FOREIGN_HOST}
    answer = service.anybody.get("/healthz", headers=named)
    redirect = service.anybody.get("/", headers=named).headers.get("Location", "")
    if _FOREIGN_HOST in redirect:
        yield "warning", "redirects lead to the host that a request names: let the proxy refuse other names"
    if not answer.is_success:
        yield "ok", f"other names than the service's are refused ({answer.status_code})"
    elif service.asks_for_keys:
        yield "ok", "any name is answered; keys protect what is asked"
    else:
        yield "problem", "any name is answered without a key, so that web pages can ask: give --api-key-file"


def compression(service: Service) -> Says:
    """Of large answers, which the service leaves to a proxy."""
    answer = service.http.get("/openapi.json", headers={"Accept-Encoding": "gzip, br, zstd"})
    yield "ok", answer.headers.get("Content-Encoding", "none; a proxy may add it for clients that are far away")


def _times(seconds: list[float]) -> Says:
    if not seconds:
        return
    median, longest = np.median(seconds), max(seconds)
    text = f"{len(seconds)} queries one by one: p50 {median * 1e3:.0f} ms, max {longest * 1e3:.0f} ms"
    if median > _SLOW_SECONDS:
        yield "warning", f"{text}: timing_ms of an answer says where it goes"
    else:
        yield "ok", text


def _detail(answer: httpx.Response) -> str:
    try:
        return Problem.model_validate_json(answer.content).detail
    except ValueError:
        return answer.text[:200]


def _is_local(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
