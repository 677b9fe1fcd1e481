"""Queries to an index, and the list of indexes, over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from gradtrace_client.group_and_pair_schemas import GroupsAnswer, PairsAnswer
from gradtrace_client.request_schemas import (
    SOURCES,
    GroupsRequest,
    InfluenceRequest,
    PairsRequest,
    SelfInfluenceRequest,
)
from gradtrace_client.schemas import ExampleAnswer, IndexDetails, InfluenceAnswer, SelfInfluenceAnswer, Split
from gradtrace_client.service_schemas import Indexes
from gradtrace_service.answers import documents, groups_and_pairs, rows
from gradtrace_service.answers import influence as answers
from gradtrace_service.answers.passes import A, Pass, Q, joined, outdated, passes_of
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Work
from gradtrace_service.errors import FieldError
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.problems import error_responses
from gradtrace_service.ops.timings import server_timing, trace_stages

T = TypeVar("T")

router = APIRouter(route_class=JsonRoute)


class _Choice(BaseModel):
    """A model, because it refuses unknown parameters: a misspelt one would be ignored, and the first index asked."""

    model_config = ConfigDict(extra="forbid")

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")


Choice = Annotated[_Choice, Query()]


class _TimedEngine:
    """The engine, for routes: puts the times of an answer into its headers and its trace."""

    def __init__(self, request: Request, response: Response) -> None:
        self._state, self._headers = request.app.state, response.headers
        self._client: str = request.state.caller

    async def run(self, work: Work[T]) -> T:
        """As `Engine.run`. Raises FieldError, too, where no index has the name: made-up names do not wait."""
        return self._timed(await self._engine.run(self._addressed(work)))

    async def run_in_passes(self, request: Q, work: Callable[[Q], Work[A]]) -> A:
        """As `run`, for a request of many queries, which is accepted, and counts, once. work: of each pass"""
        passes = passes_of(request, self._engine.settings.batch_size)
        works = [self._addressed(work(part.request)) for part in passes]
        with self._engine.accept(works[0]) as accepted:
            answers = [await _named(accepted.answer(work), part) for work, part in zip(works, passes, strict=True)]
            while behind := outdated(answers):  # a new generation was taken up in between
                for at in behind:
                    answers[at] = await _named(accepted.answer(works[at]), passes[at])
        return self._timed(joined(answers))

    @property
    def _engine(self) -> Engine:
        engine: Engine = self._state.engine
        return engine

    def _addressed(self, work: Work[T]) -> Work[T]:
        return replace(work, index=self._state.index_name(work.index), client=self._client)

    def _timed(self, answer: T) -> T:
        timing = getattr(answer, "timing_ms", None)
        if timing is not None:
            self._headers["Server-Timing"] = server_timing(timing)
            if self._state.tracer_provider is not None:
                trace_stages(self._state.tracer_provider, timing)
        return answer


async def _named(answer: Awaitable[A], part: Pass[Any]) -> A:
    try:
        return await answer
    except FieldError as refusal:
        raise part.named(refusal) from None


async def _timed_engine(request: Request, response: Response) -> _TimedEngine:
    return _TimedEngine(request, response)  # the class by itself would be called on a thread, for each request


Workers = Annotated[_TimedEngine, Depends(_timed_engine)]


@router.post("/influence", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence(request: InfluenceRequest, engine: Workers) -> InfluenceAnswer:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for."""
    key = None if request.aggregate else _batch_key(request)
    return await engine.run_in_passes(
        request, lambda part: Work(request.index, answers.influence, part, part.queries, key)
    )


@router.post("/influence/groups", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_groups(request: GroupsRequest, engine: Workers) -> GroupsAnswer:
    """Sums of the scores of the training rows that share a label, or another column's value, on each query."""
    return await engine.run_in_passes(request, lambda part: Work(request.index, groups_and_pairs.groups, part))


@router.post("/influence/pairs", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_pairs(request: PairsRequest, engine: Workers) -> PairsAnswer:
    """The scores of given training examples, which need not be in the training set, on each query."""
    return await engine.run(Work(request.index, groups_and_pairs.pairs, request))


@router.get("/self-influence", responses=error_responses(422, 429, 500, 503, 504))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: Workers) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(Work(request.index, rows.self_influence, request))


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500, 503, 504))
async def example(
    split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: Workers, choice: Choice
) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(Work(choice.index, rows.example, (split, row)))


@router.get("/index", responses=error_responses(422, 429, 500, 503, 504))
async def index_details(engine: Workers, choice: Choice) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(Work(choice.index, documents.index_details))


@router.get("/indexes", responses=error_responses(500))
def indexes(request: Request) -> Indexes:
    """The indexes that requests may name; the first is the default."""
    return Indexes(indexes=request.app.state.summaries())


def _batch_key(request: InfluenceRequest) -> tuple[str, frozenset[str]]:
    """Everything of a request but its queries: requests of equal keys are answered in one pass."""
    return request.model_dump_json(exclude={*SOURCES, "include"}), request.include  # as text, sets have no one order
