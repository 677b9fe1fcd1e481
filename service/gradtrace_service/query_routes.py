"""Questions to an index, over HTTP."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from gradtrace_client.group_and_pair_schemas import GroupsAnswer, GroupsRequest, PairsAnswer, PairsRequest
from gradtrace_client.schemas import (
    SOURCES,
    ExampleAnswer,
    IndexDetails,
    InfluenceAnswer,
    InfluenceRequest,
    SelfInfluenceAnswer,
    SelfInfluenceRequest,
    Split,
)
from gradtrace_service import answers, groups_and_pairs
from gradtrace_service.engine import Engine
from gradtrace_service.problems import error_responses
from gradtrace_service.work import Work

router = APIRouter()

IndexName = Annotated[str | None, Query(max_length=64, description="Which of the service's indexes.")]


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


Workers = Annotated[Engine, Depends(_engine)]


@router.post("/influence", responses=error_responses(400, 413, 422, 429, 500, 503, 504))
async def influence(request: InfluenceRequest, engine: Workers) -> InfluenceAnswer:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for."""
    return await engine.run(_influence(request))


@router.post("/influence/groups", responses=error_responses(400, 413, 422, 429, 500, 503, 504))
async def influence_groups(request: GroupsRequest, engine: Workers) -> GroupsAnswer:
    """Sums of the scores of the training rows that share a label, or another column's value, on each query."""
    return await engine.run(Work(request.index, partial(groups_and_pairs.groups, request=request)))


@router.post("/influence/pairs", responses=error_responses(400, 413, 422, 429, 500, 503, 504))
async def influence_pairs(request: PairsRequest, engine: Workers) -> PairsAnswer:
    """The scores of given training examples, which need not be in the training set, on each query."""
    return await engine.run(Work(request.index, partial(groups_and_pairs.pairs, request=request)))


@router.get("/self-influence", responses=error_responses(422, 429, 500, 503, 504))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: Workers) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(Work(request.index, partial(answers.self_influence, request=request)))


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500, 503, 504))
async def example(
    split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: Workers, index: IndexName = None
) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(Work(index, partial(answers.example, split=split, row=row)))


@router.get("/index", responses=error_responses(422, 429, 500, 503, 504))
async def index_details(engine: Workers, index: IndexName = None) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(Work(index, answers.index_details))


def _influence(request: InfluenceRequest) -> Work[InfluenceAnswer]:
    kind = None if request.aggregate else request.model_dump_json(exclude=set(SOURCES))
    return Work(
        request.index,
        partial(answers.one_influence, request=request),
        kind=kind,
        size=request.queries,
        request=request,
        together=answers.influences,
    )
