"""The HTTP interface of one open index."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from fastapi.responses import RedirectResponse

from gradtrace import Index
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, GroupsRequest, PairsAnswer, PairsRequest
from gradtrace_client.schemas import (
    ExampleAnswer,
    IndexDetails,
    InfluenceAnswer,
    InfluenceRequest,
    SelfInfluenceAnswer,
    SelfInfluenceRequest,
    Split,
    Status,
)
from gradtrace_service import answers, groups_and_pairs
from gradtrace_service.body_limit import BodyLimit
from gradtrace_service.engine import QUEUE_SIZE, Engine
from gradtrace_service.problems import add_problem_handlers, error_responses

MAX_BODY_BYTES = 16 * 2**20

router = APIRouter()


def create_app(index: Index, *, queue_size: int = QUEUE_SIZE) -> FastAPI:
    """The service over `index`, which belongs to the service's own thread from now on."""
    engine = Engine(index, queue_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title="Gradtrace",
        summary="Which training examples made this model predict that?",
        version=version("gradtrace"),
        lifespan=lifespan,
    )
    app.state.engine = engine
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    add_problem_handlers(app)
    app.include_router(router)
    return app


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


OwnerThread = Annotated[Engine, Depends(_engine)]


@router.post("/influence", responses=error_responses(400, 413, 422, 429, 500))
async def influence(request: InfluenceRequest, engine: OwnerThread) -> InfluenceAnswer:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for."""
    return await engine.run(lambda index, waited: answers.influence(index, request, waited))


@router.post("/influence/groups", responses=error_responses(400, 413, 422, 429, 500))
async def influence_groups(request: GroupsRequest, engine: OwnerThread) -> GroupsAnswer:
    """Sums of the scores of the training rows that share a label, or another column's value, on each query."""
    return await engine.run(lambda index, waited: groups_and_pairs.groups(index, waited, request=request))


@router.post("/influence/pairs", responses=error_responses(400, 413, 422, 429, 500))
async def influence_pairs(request: PairsRequest, engine: OwnerThread) -> PairsAnswer:
    """The scores of given training examples, which need not be in the training set, on each query."""
    return await engine.run(lambda index, waited: groups_and_pairs.pairs(index, waited, request=request))


@router.get("/self-influence", responses=error_responses(422, 429, 500))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: OwnerThread) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(lambda index, waited: answers.self_influence(index, request, waited))


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500))
async def example(split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: OwnerThread) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(lambda index, waited: answers.example(index, split, row))


@router.get("/index", responses=error_responses(429, 500))
async def index_details(engine: OwnerThread) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(lambda index, waited: answers.index_details(index))


@router.get("/healthz")
async def healthz() -> Status:
    """The process is alive."""
    return Status(status="ok")


@router.get("/readyz", responses=error_responses(429, 500))
async def readyz(engine: OwnerThread) -> Status:
    """Queries are being answered."""
    return await engine.run(lambda index, waited: Status(status="ready"))


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")
