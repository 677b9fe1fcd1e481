"""Client and AsyncClient: the calls of `_calls`, sent over httpx."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import httpx
from pydantic import BaseModel

from gradtrace_client import _calls
from gradtrace_client._calls import Call
from gradtrace_client._retry import wait_before_retry

P = ParamSpec("P")
Answer = TypeVar("Answer", bound=BaseModel)
Outcome = httpx.Response | httpx.TransportError


class _Method(Generic[P, Answer]):
    """A call as a method, with the call's signature: a Client's returns the answer, an AsyncClient's an awaitable."""

    def __init__(self, build: Callable[P, Call[Answer]]) -> None:
        self._build = build

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Call[Answer]]: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Answer]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Awaitable[Answer]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Callable[P, Any]:
        if client is None:
            return self._build
        send: Callable[[Call[Answer]], Any] = client._send

        @functools.wraps(self._build)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return send(self._build(*args, **kwargs))

        return method


class _Calls:
    influence = _Method(_calls.influence)
    groups = _Method(_calls.groups)
    pairs = _Method(_calls.pairs)
    self_influence = _Method(_calls.self_influence)
    examples = _Method(_calls.examples)
    index = _Method(_calls.index)


class Client(_Calls):
    """A connection to a Gradtrace service.

    Args:
        url: Where the service is, such as `http://127.0.0.1:8000`.
        api_key: Sent as a bearer token.
        timeout: Seconds until an attempt is given up.
        retries: Further attempts after a lost connection or an answer of 429 or 503.
        transport: How requests travel; for tests and proxies.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), timeout=timeout, transport=transport)

    def _send(self, call: Call[Answer]) -> Answer:
        for attempt in range(self._retries):
            outcome = self._attempt(call)
            wait = wait_before_retry(outcome, attempt)
            if wait is None:
                return call.result(outcome)
            time.sleep(wait)
        return call.result(self._attempt(call))

    def _attempt(self, call: Call[Answer]) -> Outcome:
        try:
            return self._http.request(call.verb, call.path, json=call.json, params=call.params)
        except httpx.TransportError as error:
            return error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Calls):
    """The same as Client, with every call awaited."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout, transport=transport)

    async def _send(self, call: Call[Answer]) -> Answer:
        for attempt in range(self._retries):
            outcome = await self._attempt(call)
            wait = wait_before_retry(outcome, attempt)
            if wait is None:
                return call.result(outcome)
            await asyncio.sleep(wait)
        return call.result(await self._attempt(call))

    async def _attempt(self, call: Call[Answer]) -> Outcome:
        try:
            return await self._http.request(call.verb, call.path, json=call.json, params=call.params)
        except httpx.TransportError as error:
            return error

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
