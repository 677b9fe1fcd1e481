"""The service: an application over one open index, or over the indexes of some directories."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from gradtrace import Index
from gradtrace_service import answers, health_routes, index_routes, job_routes, query_routes
from gradtrace_service.body_limit import BodyLimit
from gradtrace_service.catalog import Catalog, FixedIndex, Hosted
from gradtrace_service.disconnects import CancelOnDisconnect
from gradtrace_service.engine import Engine, Limits
from gradtrace_service.jobs import JobRunner
from gradtrace_service.problems import add_problem_handlers
from gradtrace_service.settings import Settings
from gradtrace_service.version_header import VersionHeader
from gradtrace_service.work import Work
from gradtrace_service.workers import answer_batch, process_workers, thread_worker


def create_app(index: Index, settings: Settings | None = None) -> FastAPI:
    """The service over an open index, which belongs to the service's own thread from now on. It offers no jobs."""
    settings = settings or Settings()
    engine = Engine(thread_worker(FixedIndex(index)), answer_batch, limits=_limits(settings))
    return _app(engine, settings, partial(index_routes.open_index_summary, index))


def create_service(hosted: list[Hosted], settings: Settings) -> FastAPI:
    """The service over the indexes of some directories, as `gradtrace serve` runs it.

    Raises:
        GradtraceError: the first index cannot be opened (with processes, the log tells).
    """
    memory = None if settings.memory_limit_mb is None else settings.memory_limit_mb << 20
    indexes = partial(Catalog, hosted, memory)
    catalog = None
    if settings.processes:
        workers, slots = process_workers(settings.processes, indexes), settings.processes
    else:
        catalog = indexes()
        catalog.get(None)  # what is wrong with it is told now, to whoever starts the service
        workers, slots = thread_worker(catalog), 1
    engine = Engine(workers, answer_batch, slots, _limits(settings))
    return _app(engine, settings, partial(index_routes.hosted_summaries, hosted, catalog), JobRunner(hosted))


def _limits(settings: Settings) -> Limits:
    return Limits(settings.queue_size, settings.batch_size, settings.batch_wait_ms, settings.deadline_seconds)


def _app(
    engine: Engine, settings: Settings, summaries: index_routes.Summaries, jobs: JobRunner | None = None
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(_warm_up(app, engine))
        if jobs is not None:
            jobs.resume()
        yield
        warming.cancel()
        if jobs is not None:
            await jobs.close()
        engine.close()

    app = FastAPI(
        title="Gradtrace",
        summary="Which training examples made this model predict that?",
        version=version("gradtrace"),
        lifespan=lifespan,
    )
    app.state.engine, app.state.jobs, app.state.ready = engine, jobs, False
    app.state.summaries = summaries
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimit, max_bytes=int(settings.max_body_mb * 2**20))
    app.add_middleware(VersionHeader, version=app.version)
    add_problem_handlers(app)
    app.include_router(query_routes.router)
    app.include_router(index_routes.router)
    if jobs is not None:
        app.include_router(job_routes.router)
    app.include_router(health_routes.router)
    return app


async def _warm_up(app: FastAPI, engine: Engine) -> None:
    """The first query loads the index and makes the libraries choose their ways: no user should wait for it."""
    await asyncio.gather(*(engine.run(Work(None, answers.warm_up)) for _ in range(engine.slots)))
    app.state.ready = True
