"""The HTTP interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from fastapi.responses import RedirectResponse

from gradtrace import Index
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
from gradtrace_service import answers
from gradtrace_service.body_limit import BodyLimit
from gradtrace_service.catalog import Catalog, FixedIndex, Hosted
from gradtrace_service.disconnects import CancelOnDisconnect
from gradtrace_service.engine import Engine, Limits
from gradtrace_service.problems import NotReadyError, add_problem_handlers, error_responses
from gradtrace_service.settings import Settings
from gradtrace_service.work import Work
from gradtrace_service.workers import answer_batch, process_workers, thread_worker

router = APIRouter()

IndexName = Annotated[str | None, Query(max_length=64, description="Which of the service's indexes.")]


def create_app(index: Index, settings: Settings | None = None) -> FastAPI:
    """The service over an open index, which belongs to the service's own thread from now on."""
    settings = settings or Settings()
    return _app(Engine(thread_worker(FixedIndex(index)), answer_batch, limits=_limits(settings)), settings)


def create_service(hosted: list[Hosted], settings: Settings) -> FastAPI:
    """The service over the indexes of some directories, as `gradtrace serve` runs it.

    Raises:
        GradtraceError: the first index cannot be opened (with processes, the log tells).
    """
    memory = None if settings.memory_limit_mb is None else settings.memory_limit_mb << 20
    indexes = partial(Catalog, hosted, memory)
    if settings.processes:
        workers, slots = process_workers(settings.processes, indexes), settings.processes
    else:
        catalog = indexes()
        catalog.get(None)  # what is wrong with it is told now, to whoever starts the service
        workers, slots = thread_worker(catalog), 1
    return _app(Engine(workers, answer_batch, slots, _limits(settings)), settings)


def _limits(settings: Settings) -> Limits:
    return Limits(settings.queue_size, settings.batch_size, settings.batch_wait_ms, settings.deadline_seconds)


def _app(engine: Engine, settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(_warm_up(app, engine))
        yield
        warming.cancel()
        engine.close()

    app = FastAPI(
        title="Gradtrace",
        summary="Which training examples made this model predict that?",
        version=version("gradtrace"),
        lifespan=lifespan,
    )
    app.state.engine, app.state.ready = engine, False
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimit, max_bytes=int(settings.max_body_mb * 2**20))
    add_problem_handlers(app)
    app.include_router(router)
    return app


async def _warm_up(app: FastAPI, engine: Engine) -> None:
    """The first query loads the index and makes the libraries choose their ways: no user should wait for it."""
    await asyncio.gather(*(engine.run(Work(None, answers.warm_up)) for _ in range(engine.slots)))
    app.state.ready = True


def _influence(request: InfluenceRequest) -> Work[InfluenceAnswer]:
    kind = None if request.aggregate else request.model_dump_json(exclude=set(answers.SOURCES))
    return Work(
        request.index,
        partial(answers.one_influence, request=request),
        kind=kind,
        size=request.queries,
        request=request,
        together=answers.influences,
    )


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


Workers = Annotated[Engine, Depends(_engine)]


@router.post("/influence", responses=error_responses(400, 413, 422, 429, 500, 504))
async def influence(request: InfluenceRequest, engine: Workers) -> InfluenceAnswer:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for."""
    return await engine.run(_influence(request))


@router.get("/self-influence", responses=error_responses(422, 429, 500, 504))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: Workers) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(Work(request.index, partial(answers.self_influence, request=request)))


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500, 504))
async def example(
    split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: Workers, index: IndexName = None
) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(Work(index, partial(answers.example, split=split, row=row)))


@router.get("/index", responses=error_responses(422, 429, 500, 504))
async def index_details(engine: Workers, index: IndexName = None) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(Work(index, answers.index_details))


@router.get("/healthz")
async def healthz() -> Status:
    """The process is alive."""
    return Status(status="ok")


@router.get("/readyz", responses=error_responses(503))
async def readyz(request: Request) -> Status:
    """Queries are being answered: the index is loaded, and the first query was answered."""
    if not request.app.state.ready:
        raise NotReadyError
    return Status(status="ready")


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")
