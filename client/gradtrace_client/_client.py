"""Client and AsyncClient: the calls of `_calls` and `_streams`, sent over httpx."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import httpx
from pydantic import BaseModel

from gradtrace_client import _calls, _streams
from gradtrace_client._call import VERSION, Call
from gradtrace_client._errors import BusyError, ClientError, DeadlineError, ForbiddenError, NotTakenOverError
from gradtrace_client._following import (
    LOOK_SECONDS,
    POLL_SECONDS,
    TAKE_OVER_SECONDS,
    has_events,
    progress_bar,
    state_in,
    succeeded,
)
from gradtrace_client._retry import wait_before_retry
from gradtrace_client.schemas import Hit, Influence
from gradtrace_client.service_schemas import Job

P = ParamSpec("P")
Answer = TypeVar("Answer", bound=BaseModel)
Item = TypeVar("Item")
Outcome = httpx.Response | httpx.RequestError

TIMEOUT = httpx.Timeout(70.0, connect=10.0)  # beyond the service's own deadline, by default 60 s: it says what was late
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)


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
        return _bound(self._build, None if client is None else client._send)


class _Stream(Generic[P, Item]):
    """Pages of calls as a method that iterates over the results of all; an AsyncClient's is an async iterator."""

    def __init__(self, build: Callable[P, Generator[Call[Any], Any, None]], item: type[Item]) -> None:
        self._build = build

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Generator[Call[Any], Any, None]]: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Iterator[Item]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, AsyncIterator[Item]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Callable[P, Any]:
        return _bound(self._build, None if client is None else client._results)


def _bound(build: Callable[P, Any], send: Callable[[Any], Any] | None) -> Callable[P, Any]:
    if send is None:
        return build

    @functools.wraps(build)
    def method(*args: P.args, **kwargs: P.kwargs) -> Any:
        return send(build(*args, **kwargs))

    return method


class _Calls:
    influence = _Method(_calls.influence)
    groups = _Method(_calls.groups)
    pairs = _Method(_calls.pairs)
    self_influence = _Method(_calls.self_influence)
    examples = _Method(_calls.examples)
    index = _Method(_calls.index)
    indexes = _Method(_calls.indexes)
    reindex = _Method(_calls.reindex)
    job = _Method(_calls.job)
    jobs = _Method(_calls.jobs)
    stream_influence = _Stream(_streams.stream_influence, Influence)
    stream_self_influence = _Stream(_streams.stream_self_influence, Hit)


class Client(_Calls):
    """A connection to a Gradtrace service. It may be shared by threads.

    Args:
        url: Where the service is, such as `http://127.0.0.1:8000`.
        api_key: Sent as a bearer token.
        timeout: Seconds, or an httpx.Timeout, until an attempt is given up.
        limits: Connections that are open at once, and kept.
        retries: Further attempts after a lost connection or an answer of 429 or 503.
        transport: How requests travel; for tests and proxies. It has limits of its own.

    Raises:
        ClientError: the address is none, or no header can hold the key.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = TIMEOUT,
        limits: httpx.Limits = LIMITS,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=_checked(url), headers=_headers(api_key), timeout=timeout, limits=limits, transport=transport
        )

    def follow(self, job: Job | str) -> Iterator[Job]:
        """The job's states, now and whenever they change, to its end: by the service's events or, where these do not
        come through or are cut off, by asking every second.

        Raises:
            ClientError: see the tree in `gradtrace_client`; NotFoundError where there is no such job.
        """
        state = None
        for state in self._events(_calls.job_path(job)):
            yield state
        while state is None or state.state == "running":
            if state is not None:
                time.sleep(POLL_SECONDS)
            state = self.job(job)
            yield state

    def wait(self, job: Job | str, *, progress: bool = True, take_over_timeout: float = TAKE_OVER_SECONDS) -> Job:
        """The job's last state, once it has succeeded and the service answers by the new generation.

        Args:
            progress: show a bar, on a terminal and in a notebook.
            take_over_timeout: seconds that the service may take to open the new generation after the job's end.

        Raises:
            JobFailedError: it failed.
            NotTakenOverError: the service goes on answering by an earlier generation.
            ClientError: see the tree in `gradtrace_client`; NotFoundError where there is no such job.
        """
        with progress_bar(progress) as show:
            for state in self.follow(job):
                show(state)
        ended, since = succeeded(state), time.monotonic()
        while not self._takes_over(ended):
            if time.monotonic() - since > take_over_timeout:
                raise NotTakenOverError(ended, take_over_timeout)
            time.sleep(LOOK_SECONDS)
        return ended

    def _takes_over(self, job: Job) -> bool:
        try:
            return self.index(job.index).generation >= job.generation
        except (BusyError, DeadlineError):
            return False
        except ForbiddenError:  # the key may start jobs and not ask
            return True

    def _events(self, path: str) -> Iterator[Job]:
        """As far as they come."""
        try:
            with self._http.stream("GET", f"{path}/events") as response:
                if has_events(response):
                    yield from filter(None, map(state_in, response.iter_lines()))
        except httpx.RequestError:
            return

    def _send(self, call: Call[Answer]) -> Answer:
        for attempt in range(self._retries):
            outcome = self._attempt(call)
            wait = wait_before_retry(outcome, attempt, call.repeatable)
            if wait is None:
                return call.result(outcome)
            time.sleep(wait)
        return call.result(self._attempt(call))

    def _results(self, pages: Generator[Call[Any], Any, None]) -> Iterator[Any]:
        answer = None
        while (call := _next_page(pages, answer)) is not None:
            answer = self._send(call)
            yield from answer.results

    def _attempt(self, call: Call[Answer]) -> Outcome:
        try:
            return self._http.request(call.verb, call.path, json=call.json, params=call.params)
        except httpx.RequestError as error:
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
    """The same as Client, with every call awaited, and `async for` over streams and jobs that are followed."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = TIMEOUT,
        limits: httpx.Limits = LIMITS,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=_checked(url), headers=_headers(api_key), timeout=timeout, limits=limits, transport=transport
        )

    async def follow(self, job: Job | str) -> AsyncIterator[Job]:
        """As Client.follow."""
        state = None
        async for state in self._events(_calls.job_path(job)):
            yield state
        while state is None or state.state == "running":
            if state is not None:
                await asyncio.sleep(POLL_SECONDS)
            state = await self.job(job)
            yield state

    async def wait(self, job: Job | str, *, progress: bool = True, take_over_timeout: float = TAKE_OVER_SECONDS) -> Job:
        """As Client.wait."""
        with progress_bar(progress) as show:
            async for state in self.follow(job):
                show(state)
        ended, since = succeeded(state), time.monotonic()
        while not await self._takes_over(ended):
            if time.monotonic() - since > take_over_timeout:
                raise NotTakenOverError(ended, take_over_timeout)
            await asyncio.sleep(LOOK_SECONDS)
        return ended

    async def _takes_over(self, job: Job) -> bool:
        try:
            return (await self.index(job.index)).generation >= job.generation
        except (BusyError, DeadlineError):
            return False
        except ForbiddenError:
            return True

    async def _events(self, path: str) -> AsyncIterator[Job]:
        try:
            async with self._http.stream("GET", f"{path}/events") as response:
                if has_events(response):
                    async for line in response.aiter_lines():
                        if (state := state_in(line)) is not None:
                            yield state
        except httpx.RequestError:
            return

    async def _send(self, call: Call[Answer]) -> Answer:
        for attempt in range(self._retries):
            outcome = await self._attempt(call)
            wait = wait_before_retry(outcome, attempt, call.repeatable)
            if wait is None:
                return call.result(outcome)
            await asyncio.sleep(wait)
        return call.result(await self._attempt(call))

    async def _results(self, pages: Generator[Call[Any], Any, None]) -> AsyncIterator[Any]:
        answer = None
        while (call := _next_page(pages, answer)) is not None:
            answer = await self._send(call)
            for result in answer.results:
                yield result

    async def _attempt(self, call: Call[Answer]) -> Outcome:
        try:
            return await self._http.request(call.verb, call.path, json=call.json, params=call.params)
        except httpx.RequestError as error:
            return error

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ClientError(f"{url!r} is no address of a service; write it as http://HOST:PORT or https://HOST")
    return url


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"User-Agent": f"gradtrace-client/{VERSION}"}
    if api_key is not None:
        key = api_key.strip()  # what is read from a file ends with its line
        if not (key.isascii() and key.isprintable()):  # httpx would show it in its error
            raise ClientError(
                "the API key has characters that no header may hold; copy it again from where it was made"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _next_page(pages: Generator[Call[Any], Any, None], answer: Any) -> Call[Any] | None:
    """The call for the page after the one that was answered so; None: there is none."""
    try:
        return pages.send(answer)
    except StopIteration:
        return None
