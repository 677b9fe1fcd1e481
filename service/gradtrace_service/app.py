"""The service: an application over one open index, or over the indexes of some directories."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from gradtrace import Index
from gradtrace_service.answers.browsed import look_ahead
from gradtrace_service.answers.influence import warm_up
from gradtrace_service.engine.background import Background
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.processes import ProcessWorker
from gradtrace_service.engine.work import Work
from gradtrace_service.engine.workers import ThreadWorker, Worker
from gradtrace_service.http import (
    browse_routes,
    docs_page,
    event_routes,
    generation_routes,
    job_routes,
    ops_routes,
    page_routes,
    query_routes,
    state_routes,
)
from gradtrace_service.http.api_keys import KeyFile
from gradtrace_service.http.metrics import Metrics
from gradtrace_service.http.middlewares import add_middlewares, guarded, key_file
from gradtrace_service.http.problems import add_problem_handlers
from gradtrace_service.http.streams import OpenStreams
from gradtrace_service.indexes.catalog import Catalog
from gradtrace_service.indexes.changes import Changes
from gradtrace_service.indexes.hosted import Hosted, known_name
from gradtrace_service.indexes.jobs import JobRunner
from gradtrace_service.indexes.open_index import OpenIndex, no_name
from gradtrace_service.indexes.summaries import Summaries, summaries, summary
from gradtrace_service.indexes.training_rows import RowsOf, RowsOnDisk, rows_of_open_index
from gradtrace_service.ops.audit import AuditLog
from gradtrace_service.ops.logs import log_config
from gradtrace_service.ops.timings import tracer_provider
from gradtrace_service.settings import DEFAULTS, Settings
from gradtrace_service.state.database import Database

_TRY_AGAIN_SECONDS = 5
_REFRESH_SECONDS = 1.0  # between two looks at the indexes of workers that have nothing to do

_log = logging.getLogger(__name__)


def create_app(index: Index, settings: Settings | None = None) -> FastAPI:
    """The service over an open index, which belongs to the service's thread from now on. It offers no jobs, and keeps
    marks and questions only where the settings name a file for them.

    Once a file of the index was written to, all answers are 503, also after a repair: open it anew, for another app.

    settings: None: the defaults, whatever the environment says
    """
    settings, metrics = settings or DEFAULTS, Metrics()
    keys, audit = key_file(settings), AuditLog(settings.audit_log)
    engine = Engine([ThreadWorker(OpenIndex(index))], settings, metrics.batch_answered)
    metrics.watch(engine)
    database = None if settings.state is None else Database(settings.state)
    offered = _Offered(lambda: [summary(None, index.manifest, loaded=True)], no_name, [None], rows_of_open_index(index))
    return _app(engine, settings, metrics, offered, audit, keys, database)


def create_service(hosted: list[Hosted], settings: Settings) -> FastAPI:
    """The service over the indexes of some directories, as `gradtrace serve` runs it.

    Raises:
        GradtraceError: the first index cannot be opened, or a file that the settings name cannot be read.
        OSError: the audit log cannot be written.
    """
    keys, audit = key_file(settings), AuditLog(settings.audit_log)  # opening the index takes longer
    workers = _workers(hosted, settings)
    try:
        if hosted:
            workers[0].open_default()  # so that whoever starts the service learns now what is wrong with it
        metrics, database = Metrics(), Database(state_file(hosted, settings))
        jobs = JobRunner(hosted, database, settings.job_workers)
        engine = Engine(workers, settings, metrics.batch_answered)
        metrics.watch(engine, hosted, jobs)
        by_name = {index.name: index for index in hosted}
        offered = _Offered(
            partial(summaries, hosted, engine), partial(known_name, by_name), list(by_name), RowsOnDisk(hosted)
        )
        app = _app(engine, settings, metrics, offered, audit, keys, database, jobs)
        app.state.hosted = by_name
        return app
    except BaseException:  # a worker process that is left would keep the program from ending
        audit.close()
        for worker in workers:
            worker.close(wait=False)
        raise


@dataclass(frozen=True, slots=True)
class _Offered:
    """The indexes of a service, as its routes see them.

    index_name: by which work waits, for one that a request names or leaves out
    names: None: the only one, which has no name
    """

    summaries: Summaries
    index_name: Callable[[str | None], str | None]
    names: Sequence[str | None]
    rows_of: RowsOf


def state_file(hosted: Sequence[Hosted], settings: Settings) -> Path:
    """Where marks, questions and jobs are kept: beside the first index, unless the settings name a file."""
    if settings.state is not None or not hosted:
        return settings.state or Path("gradtrace.state.sqlite")
    index = hosted[0].path.resolve()
    return index.with_name(f"{index.name}.state.sqlite")


def _workers(hosted: list[Hosted], settings: Settings) -> Sequence[Worker]:
    indexes = partial(Catalog, hosted, _bytes(settings.memory_limit_mb))
    if not settings.processes:
        return [ThreadWorker(indexes())]
    limit, log = _bytes(settings.worker_memory_limit_mb), log_config(settings)
    return [ProcessWorker(indexes, log, limit) for _ in range(settings.processes)]


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes << 20


def _app(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    offered: _Offered,
    audit: AuditLog,
    keys: KeyFile | None,
    database: Database | None,
    jobs: JobRunner | None = None,
) -> FastAPI:
    tracing = tracer_provider(settings.otel_endpoint)
    app = FastAPI(
        title="Gradtrace",
        summary="Which training examples made this model predict that?",
        version=version("gradtrace"),
        lifespan=partial(_lifespan, audit=audit),
        docs_url=None,  # `docs_page` in its place
        redoc_url=None,
        redirect_slashes=False,  # its redirects would lead to whatever host the request names
        telemetry=None if tracing is None else {"tracer_provider": tracing, "operation_spans": False},
    )
    app.state.engine, app.state.jobs, app.state.ready = engine, jobs, False
    app.state.started = datetime.now(timezone.utc)
    app.state.background, app.state.streams = Background(engine), OpenStreams()
    app.state.metrics, app.state.tracer_provider, app.state.summaries = metrics, tracing, offered.summaries
    app.state.index_name, app.state.rows_of, app.state.database = offered.index_name, offered.rows_of, database
    app.state.changes = Changes(offered.names, offered.rows_of, database, jobs)
    add_middlewares(app, settings, metrics, keys)
    add_problem_handlers(app)
    _add_routes(app, settings, jobs, database)
    return app


def _add_routes(app: FastAPI, settings: Settings, jobs: JobRunner | None, database: Database | None) -> None:
    behind_keys = [query_routes.router, browse_routes.router]
    behind_keys += [] if jobs is None else [job_routes.router, generation_routes.router]
    behind_keys += [] if database is None else [state_routes.router]
    for router in (*behind_keys, event_routes.router, ops_routes.metrics_router):
        app.include_router(router, **guarded(settings))
    for router in (ops_routes.open_router, docs_page.router, page_routes.router):
        app.include_router(router)


@asynccontextmanager
async def _lifespan(app: FastAPI, audit: AuditLog) -> AsyncIterator[None]:
    engine, jobs = app.state.engine, app.state.jobs
    database: Database | None = app.state.database
    background = [
        asyncio.ensure_future(work) for work in (_warm_up(app, engine), _refresh(engine), app.state.changes.run())
    ]
    if jobs is not None:
        await jobs.resume()
    yield
    for task in background:
        task.cancel()
    app.state.background.close()
    if jobs is not None:
        await jobs.close()
    if database is not None:
        await database.close()
    engine.close()
    audit.close()
    if app.state.tracer_provider is not None:
        app.state.tracer_provider.shutdown()


async def end_streams(app: FastAPI) -> None:
    """End answers that would go on, and start no more jobs: a server waits for its answers when it ends."""
    await app.state.changes.drain()
    if app.state.jobs is not None:
        await app.state.jobs.drain()


async def drain(app: FastAPI) -> None:
    """Refuse new requests, /readyz included, and wait until all accepted ones are answered."""
    await end_streams(app)
    await app.state.engine.drain()


async def _warm_up(app: FastAPI, engine: Engine) -> None:
    """Answer a first query on every worker before traffic, which loads the index and triggers kernel selection, and
    look at the first rows of the query set, which the page shows.

    Until then, /readyz says 503. An index that cannot be opened is tried again and again: it may be repaired while the
    service runs.
    """
    warm: set[int] = set()
    work = Work(app.state.index_name(None), warm_up, internal=True)
    while len(warm) < len(engine.workers):
        tries = [engine.run(work) for _ in engine.workers]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        warm.update(outcome for outcome in outcomes if isinstance(outcome, int))
        if engine.draining:
            return
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if failures:
            cause = failures[0].__cause__ or failures[0]
            text = str(cause) or type(cause).__name__
            _log.error("not ready, and trying again every %d s: the first query failed: %s", _TRY_AGAIN_SECONDS, text)
        await asyncio.sleep(_TRY_AGAIN_SECONDS if failures else 0.05)
    ahead = Work(work.index, look_ahead, internal=True)
    looks = [engine.run(ahead) for _ in engine.workers]
    await asyncio.gather(*looks, return_exceptions=True)  # whoever looks at the query set is told what is wrong with it
    app.state.ready = True
    _log.info("ready")


async def _refresh(engine: Engine) -> None:
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        try:
            await engine.refresh()
        except Exception:  # the next look may succeed, and nobody else would look
            _log.exception("the workers could not be asked for the states of their indexes; they are asked again")
