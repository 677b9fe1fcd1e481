"""Questions to an index, over HTTP."""

from __future__ import annotations

from functools import partial
from typing import Annotated, TypeVar

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
from gradtrace_service.answers import groups_and_pairs
from gradtrace_service.answers import influence as answers
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Work
from gradtrace_service.http.problems import error_responses
from gradtrace_service.ops.tracing import trace_stages
from gradtrace_service.timings import server_timing

T = TypeVar("T")

router = APIRouter()


class _Choice(BaseModel):
    """A model, since a parameter of another name would be passed over, and the first index asked instead."""

    model_config = ConfigDict(extra="forbid")

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")


Choice = Annotated[_Choice, Query()]


class _Asking:
    """What routes ask through: an answer's times go into its headers and its trace as well."""

    def __init__(self, request: Request, response: Response) -> None:
        self._state, self._headers = request.app.state, response.headers

    async def run(self, work: Work[T]) -> T:
        """As the engine's."""
        engine: Engine = self._state.engine
        answer = await engine.run(work)
        timing = getattr(answer, "timing_ms", None)
        if timing is not None:
            self._headers["Server-Timing"] = server_timing(timing)
            if self._state.tracer_provider is not None:
                trace_stages(self._state.tracer_provider, timing)
        return answer


Workers = Annotated[_Asking, Depends()]


@router.post("/influence", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence(request: InfluenceRequest, engine: Workers) -> InfluenceAnswer:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for."""
    return await engine.run(_influence(request))


@router.post("/influence/groups", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_groups(request: GroupsRequest, engine: Workers) -> GroupsAnswer:
    """Sums of the scores of the training rows that share a label, or another column's value, on each query."""
    return await engine.run(Work(request.index, partial(groups_and_pairs.groups, request=request)))


@router.post("/influence/pairs", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_pairs(request: PairsRequest, engine: Workers) -> PairsAnswer:
    """The scores of given training examples, which need not be in the training set, on each query."""
    return await engine.run(Work(request.index, partial(groups_and_pairs.pairs, request=request)))


@router.get("/self-influence", responses=error_responses(422, 429, 500, 503, 504))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: Workers) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(Work(request.index, partial(answers.self_influence, request=request)))


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500, 503, 504))
async def example(
    split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: Workers, choice: Choice
) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(Work(choice.index, partial(answers.example, split=split, row=row)))


@router.get("/index", responses=error_responses(422, 429, 500, 503, 504))
async def index_details(engine: Workers, choice: Choice) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(Work(choice.index, answers.index_details))


def _influence(request: InfluenceRequest) -> Work[InfluenceAnswer]:
    kind = None if request.aggregate else repr(request.model_dump(exclude=set(SOURCES)))
    return Work(
        request.index,
        partial(answers.one_influence, request=request),
        kind=kind,
        size=request.queries,
        request=request,
        together=answers.influences,
    )
