"""Who may ask for what, and how often: decided before a request's body is read."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from gradtrace_service.http.api_keys import ApiKey, KeyFile, Scope
from gradtrace_service.http.docs_page import PAGES
from gradtrace_service.http.page_routes import PREFIX as PAGE
from gradtrace_service.http.problems import problem
from gradtrace_service.ops.audit import audited

OPEN = PAGES | {"/", "/openapi.json", "/healthz", "/readyz"}  # reveal nothing about any index
_ANY_KEY = frozenset({"/whoami"})  # tells the holder of a key what it is for
_MINUTE = 60.0


class RateLimit:
    """A token bucket for each client: it holds the requests of one minute, and fills evenly.

    Of each bucket only the moment is kept at which it is full again (the generic cell rate algorithm, ITU-T I.371).
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = _MINUTE / per_minute
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._swept = clock()

    def take(self, client: str) -> float:
        """Count a request. Returns 0, or the seconds until the client may send it; then it is not counted."""
        now = self._clock()
        self._sweep(now)
        full_at = max(self._full_at.get(client, now), now) + self._interval
        wait = full_at - now - _MINUTE
        if wait > 1e-6:  # below: rounding
            return wait
        self._full_at[client] = full_at
        return 0.0

    def _sweep(self, now: float) -> None:
        """Once a minute, forget clients whose bucket is full: a service runs for months."""
        if now - self._swept >= _MINUTE:
            self._swept = now
            self._full_at = {client: full_at for client, full_at in self._full_at.items() if full_at > now}


class Access:
    """ASGI middleware: refuses requests without a key of the right scope (401, 403), and too many of them (429).

    A FastAPI dependency would come too late: the framework reads and parses the body before it.

    Args:
        keys: None: anybody may ask for anything.
        rate: for each key, and for each client's address where there is no valid key.
        admin: first segments of the paths that need the scope `admin`; calls of them are audited. All other paths but
            the open ones need `query`, and /whoami any key.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None, rate: RateLimit | None, admin: frozenset[str]) -> None:
        self._app, self._keys, self._rate, self._admin = app, keys, rate, admin

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(PAGE):
            await self._app(scope, receive, send)
            return
        key = self._key(scope)
        address = scope["client"][0] if scope["client"] else ""
        caller = f"key {key.name}" if key else f"address {network(address)}"
        scope.setdefault("state", {}).update(caller=caller, key=key)
        needed = self._needed(scope["path"])
        answering = self._too_many(caller) or self._not_allowed(key, needed) or self._app
        if needed is Scope.admin:
            await audited(answering, key.name if key else None, scope, receive, send)
        else:
            await answering(scope, receive, send)

    def _needed(self, path: str) -> Scope | None:
        if path in _ANY_KEY:
            return None
        return Scope.admin if path.lstrip("/").partition("/")[0] in self._admin else Scope.query

    def _key(self, scope: Connection) -> ApiKey | None:
        scheme, _, token = Headers(scope=scope).get("Authorization", "").partition(" ")
        return self._keys.find(token.strip()) if self._keys and scheme.lower() == "bearer" else None

    def _too_many(self, caller: str) -> Response | None:
        if self._rate is None:
            return None
        wait = self._rate.take(caller)
        if not wait:
            return None
        detail = f"this client sends more requests than it may; send this one again in {math.ceil(wait)} s"
        return problem(429, "rate-limit", detail, headers={"Retry-After": str(math.ceil(wait))})

    def _not_allowed(self, key: ApiKey | None, needed: Scope | None) -> Response | None:
        if self._keys is None:
            return None
        if key is None:
            detail = "the request has no valid API key; send one as Authorization: Bearer KEY (the SDK: api_key=KEY)"
            return problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="gradtrace"'})
        if needed is not None and needed not in key.scopes:
            detail = f"the key {key.name!r} lacks the scope {needed.value!r}, which this address needs; use one with it"
            challenge = f'Bearer realm="gradtrace", error="insufficient_scope", scope="{needed.value}"'
            return problem(403, "forbidden", detail, headers={"WWW-Authenticate": challenge})
        return None


def network(address: str) -> str:
    """The addresses that one client may use: one IPv4 address, or a /64 of IPv6, with an address for each request."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket, or a gateway that hides the address
        return address
    many = isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if many else address
