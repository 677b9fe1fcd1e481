"""AsyncClient: every call of the API. `make client` generates `_sync_client.py` from this file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from httpx_sse import aconnect_sse
from pydantic import ValidationError
from tenacity import AsyncRetrying
from typing_extensions import Self, Unpack

from gradtrace_client._async_browse_client import AsyncBrowseClient
from gradtrace_client._async_state_client import AsyncStateClient
from gradtrace_client._connection import LIMITS, TIMEOUT, checked_url, request_headers, retry_policy
from gradtrace_client._errors import BusyError, DeadlineError, ForbiddenError, JobFailedError, NotTakenOverError
from gradtrace_client._options import (
    GroupsOptions,
    InfluenceOptions,
    PairsOptions,
    RemovalOptions,
    SelfInfluenceOptions,
    TokensOptions,
)
from gradtrace_client._progress_bar import progress_bar
from gradtrace_client._requests import index_param, query_pages, request_json
from gradtrace_client._responses import Answer, Verb, checked, failed_request, parse_answer
from gradtrace_client.comparison_schemas import CompareRequest, ComparisonAnswer
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, PairsAnswer
from gradtrace_client.job_requests import DeleteRowsRequest, ReindexRequest, RetrainRequest
from gradtrace_client.removal_schemas import RemovalAnswer
from gradtrace_client.request_schemas import (
    MAX_K,
    Aggregate,
    GroupsRequest,
    InfluenceRequest,
    PairsRequest,
    RemovalRequest,
    ScoresQuestion,
    SelfInfluenceRequest,
    TokensRequest,
)
from gradtrace_client.schemas import Hit, IndexDetails, Influence, InfluenceAnswer, SelfInfluenceAnswer
from gradtrace_client.service_schemas import Generations, Indexes, Job, Jobs
from gradtrace_client.token_schemas import TokensAnswer

POLL_SECONDS = 1.0  # between two requests for a job's state, if its events do not come through
TAKE_OVER_SECONDS = 60.0
TAKE_OVER_POLL_SECONDS = 0.25


class AsyncClient(AsyncBrowseClient, AsyncStateClient):
    """A connection to a Gradtrace service, which may be shared by tasks.

    Every call raises a ClientError when it fails, see the tree of errors in `gradtrace_client`: an InvalidRequestError
    names the fields at fault. In examples, paths and bytes stand for files, PIL images for PNG files, and NumPy arrays
    and tensors for nested lists.

    Args:
        url: Address of the service, such as `http://127.0.0.1:8000`.
        api_key: Sent as a bearer token.
        timeout: Seconds, or an httpx.Timeout, for each attempt.
        limits: Numbers of open and of idle connections.
        retries: Further attempts after a lost connection or an answer of 429 or 503.
        transport: Sends the requests, for tests and proxies; it has its own limits.

    Raises:
        ClientError: `url` is not an address, or the key cannot be sent in a header.
    """

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
            base_url=checked_url(url),
            headers=request_headers(api_key),
            timeout=timeout,
            limits=limits,
            transport=transport,
        )

    async def influence(
        self,
        example: Mapping[str, Any] | None = None,
        *,
        examples: Sequence[Mapping[str, Any]] | None = None,
        query_rows: Sequence[int] | None = None,
        train_rows: Sequence[int] | None = None,
        k: int = 10,
        aggregate: Aggregate | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> InfluenceAnswer:
        """The k strongest proponents and opponents of each query. Give the queries by exactly one of the first four.

        Args:
            example: One query in the task's own form, such as `{"image": pixels, "label": 3}`.
            examples: Several queries in that form.
            query_rows: Rows of the task's query data set.
            train_rows: Rows of the training data set.
            k: Number of hits at either end.
            aggregate: `mean` gives one result, whose scores are means over the queries.
            options: See `InfluenceOptions`: index, method, checkpoints, filter, rescore, include ...
        """
        body = request_json(
            InfluenceRequest,
            example=example,
            examples=examples,
            query_rows=query_rows,
            train_rows=train_rows,
            k=k,
            aggregate=aggregate,
            **options,
        )
        return await self._send("POST", "/influence", InfluenceAnswer, json=body)

    async def stream_influence(
        self,
        examples: Iterable[Mapping[str, Any]] | None = None,
        *,
        query_rows: Iterable[int] | None = None,
        train_rows: Iterable[int] | None = None,
        k: int = 10,
        page: int | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> AsyncIterator[Influence]:
        """The influence on any number of queries, in bounded memory: one result for each, in their order.

        Queries are taken from exactly one of the iterables, one page at a time. If the index changes meanwhile, later
        pages are answered by its new generation. Errors are raised when a page is requested.

        Args:
            page: Queries in a request, at most 128. Default: as many as have 1,000 hits at either end.
            options: `InfluenceOptions`, as for `influence`.
        """
        sources = {"examples": examples, "query_rows": query_rows, "train_rows": train_rows}
        for arguments in query_pages(sources, k, page, options):
            answer = await self.influence(**arguments)
            for result in answer.results:
                yield result

    async def groups(
        self,
        example: Mapping[str, Any] | None = None,
        *,
        by: str = "label",
        **options: Unpack[GroupsOptions],
    ) -> GroupsAnswer:
        """Sums of the scores of training rows that share a value of the column `by`, one of `index().columns` or
        "feature:NAME", or whose numbers are in the same range.

        Give the queries by `example`, or by one of the options `examples`, `query_rows` and `train_rows`.
        """
        body = request_json(GroupsRequest, example=example, by=by, **options)
        return await self._send("POST", "/influence/groups", GroupsAnswer, json=body)

    async def pairs(
        self,
        train_examples: Sequence[Mapping[str, Any]] | None = None,
        *,
        train_rows: Sequence[int] | None = None,
        example: Mapping[str, Any] | None = None,
        **options: Unpack[PairsOptions],
    ) -> PairsAnswer:
        """The scores of training examples, which need not be in the training set, on each query.

        Give the queries by `example`, or by one of the options `examples` and `query_rows`.
        """
        arguments = {"train_examples": train_examples, "train_rows": train_rows, "example": example}
        body = request_json(PairsRequest, **arguments, **options)
        return await self._send("POST", "/influence/pairs", PairsAnswer, json=body)

    async def removal(
        self,
        rows: Sequence[int],
        example: Mapping[str, Any] | None = None,
        **options: Unpack[RemovalOptions],
    ) -> RemovalAnswer:
        """What leaving these training rows out of the training would do to each query, as predicted.

        Give the queries by `example`, or by one of the options `examples`, `query_rows` and `train_rows`.
        """
        body = request_json(RemovalRequest, rows=rows, example=example, **options)
        return await self._send("POST", "/influence/removal", RemovalAnswer, json=body)

    async def tokens(
        self,
        rows: Sequence[int],
        example: Mapping[str, Any] | None = None,
        **options: Unpack[TokensOptions],
    ) -> TokensAnswer:
        """Which tokens of their texts, and which of the query's, the scores of these training rows come from.

        Give one query, by `example` or by one of the options `query_rows` and `train_rows`; and at most 32 rows.
        """
        body = request_json(TokensRequest, rows=rows, example=example, **options)
        return await self._send("POST", "/influence/tokens", TokensAnswer, json=body)

    async def compare(
        self, first: ScoresQuestion | Mapping[str, Any], second: ScoresQuestion | Mapping[str, Any], *, k: int = 10
    ) -> ComparisonAnswer:
        """The scores of all training rows by two questions side by side: two methods, queries, targets or indexes.

        Args:
            first, second: As a `ScoresQuestion` or a dict of its fields: the queries, by exactly one of `example`,
                `examples`, `query_rows` and `train_rows`, of several of which the mean counts; `target`, and the
                `QuestionOptions`.
            k: Hits at either end, of which the answer counts those that both have; at most 500.
        """
        body = request_json(CompareRequest, first=first, second=second, k=k)
        return await self._send("POST", "/influence/compare", ComparisonAnswer, json=body)

    async def self_influence(
        self, *, k: int = 10, offset: int = 0, **options: Unpack[SelfInfluenceOptions]
    ) -> SelfInfluenceAnswer:
        """One page of the training rows, ordered by their influence on themselves: mislabelled and unusual rows first.

        Args:
            k: Rows in the answer.
            offset: Rows skipped before the first.
            options: See `SelfInfluenceOptions`: order, labels, examples, index, method, checkpoints ...
        """
        params = request_json(SelfInfluenceRequest, k=k, offset=offset, **options)
        return await self._send("GET", "/self-influence", SelfInfluenceAnswer, params=params)

    async def stream_self_influence(
        self, *, page: int = MAX_K, **options: Unpack[SelfInfluenceOptions]
    ) -> AsyncIterator[Hit]:
        """All training rows, ordered by their influence on themselves, in bounded memory. Arguments as in
        `self_influence`; `page`: rows in a request, at most 1,000."""
        offset, rows = 0, 1
        while offset < rows:
            answer = await self.self_influence(k=page, offset=offset, **options)
            for hit in answer.results:
                yield hit
            offset, rows = offset + page, answer.rows_total

    async def index(self, name: str | None = None) -> IndexDetails:
        """What an index of the service holds; by default the first one."""
        return await self._send("GET", "/index", IndexDetails, params=index_param(name))

    async def indexes(self) -> Indexes:
        """The indexes of the service; the first is the default."""
        return await self._send("GET", "/indexes", Indexes)

    async def reindex(self, index: str | None = None, *, roll_back_to: int | None = None) -> Job:
        """Start a job that brings an index up to date with its training run and data, or back to an earlier generation.

        If such a job is already running it is returned; a different running job is a refusal (409). The request is not
        repeated when its answer is lost. Raises NotFoundError if the service offers no jobs.
        """
        body = request_json(ReindexRequest, index=index, roll_back_to=roll_back_to)
        return await self._send("POST", "/reindex", Job, repeatable=False, json=body)

    async def delete_rows(self, rows: Sequence[int], *, index: str | None = None) -> Job:
        """Start a job that deletes training rows: no answer of the index's next generation names them. Refused (409)
        while another job of the index runs; else as `reindex`."""
        body = request_json(DeleteRowsRequest, index=index, rows=rows)
        return await self._send("POST", "/rows/delete", Job, repeatable=False, json=body)

    async def retrain(
        self,
        without_rows: Sequence[int],
        *,
        query_rows: Sequence[int] | None = None,
        seed: int = 0,
        method: str | None = None,
        index: str | None = None,
    ) -> Job:
        """Start a job whose `result` compares a training with all rows of an index to one without these, and to what
        methods predict. Only where the task defines `fit`. Refused (409) while another runs; else as `delete_rows`.

        Args:
            query_rows: Rows of the query data set that are measured. Default: at most 128 at random.
            seed: Of both trainings.
            method: The one that is compared. Default: all of the index that forecast.
        """
        arguments = {"index": index, "without_rows": without_rows, "query_rows": query_rows}
        body = request_json(RetrainRequest, **arguments, seed=seed, method=method)
        return await self._send("POST", "/retrain", Job, repeatable=False, json=body)

    async def generations(self, index: str | None = None) -> Generations:
        """The generations of an index, the current one first: `reindex(roll_back_to=...)` returns to another.
        NotFoundError if the service offers no jobs."""
        return await self._send("GET", "/generations", Generations, params=index_param(index))

    async def job(self, job: Job | str) -> Job:
        """The current state of a job, given by itself or its id; NotFoundError if there is no such job."""
        return await self._send("GET", _job_path(job), Job)

    async def jobs(self) -> Jobs:
        """The jobs of the service, running and ended, the latest first; NotFoundError if the service offers none."""
        return await self._send("GET", "/jobs", Jobs)

    async def follow(self, job: Job | str) -> AsyncIterator[Job]:
        """The states of a job, now and at every change until its end; NotFoundError if there is no such job.

        They come from the service's events. If these are cut off or do not come through, the service is asked every
        second.
        """
        state = None
        async for state in self._events(job):
            yield state
        while state is None or state.state == "running":
            if state is not None:
                await asyncio.sleep(POLL_SECONDS)
            state = await self.job(job)
            yield state

    async def wait(self, job: Job | str, *, progress: bool = True, take_over_timeout: float = TAKE_OVER_SECONDS) -> Job:
        """The last state of a job, once it has succeeded and the service serves the new generation.

        Args:
            progress: Show a progress bar, on a terminal and in a notebook.
            take_over_timeout: Seconds that the service may take to open the new generation after the job's end.

        Raises:
            JobFailedError: the job failed, or was interrupted.
            NotTakenOverError: the service still serves an earlier generation.
            NotFoundError: there is no such job.
        """
        with progress_bar(progress) as show:
            async for state in self.follow(job):
                show(state)
        if state.state != "succeeded":
            raise JobFailedError(state)
        deadline = time.monotonic() + take_over_timeout
        while not await self._has_taken_over(state):
            if time.monotonic() > deadline:
                raise NotTakenOverError(state, take_over_timeout)
            await asyncio.sleep(TAKE_OVER_POLL_SECONDS)
        return state

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _send(
        self,
        verb: Verb,
        path: str,
        schema: type[Answer],
        *,
        repeatable: bool = True,
        **content: Any,
    ) -> Answer:
        """The answer to a request. repeatable: it only reads, so it may be sent again after its answer was lost"""
        return parse_answer(await self._response(verb, path, repeatable=repeatable, **content), schema)

    async def _response(self, verb: Verb, path: str, *, repeatable: bool = True, **content: Any) -> httpx.Response:
        """As `_send`, for an answer that is not JSON."""

        async def attempt() -> httpx.Response:
            try:
                response = await self._http.request(verb, path, **content)
            except httpx.RequestError as error:
                raise failed_request(error) from error
            return checked(response)

        return await AsyncRetrying(**retry_policy(self._retries, repeatable))(attempt)

    async def _events(self, job: Job | str) -> AsyncIterator[Job]:
        """A job's states, for as long as its events come through."""
        try:
            async with aconnect_sse(self._http, "GET", f"{_job_path(job)}/events") as source:
                async for event in source.aiter_sse():
                    yield Job.model_validate_json(event.data)
        except (httpx.RequestError, ValidationError):
            return

    async def _has_taken_over(self, job: Job) -> bool:
        try:
            return (await self.index(job.index)).generation >= job.generation
        except (BusyError, DeadlineError):
            return False
        except ForbiddenError:  # this API key may start jobs but not ask
            return True


def _job_path(job: Job | str) -> str:
    return f"/jobs/{quote(job if isinstance(job, str) else job.id, safe='')}"
