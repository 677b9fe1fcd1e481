"""What operators and their tools ask: whether the service is alive and answers, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gradtrace_client.service_schemas import Status
from gradtrace_service.engine.engine import DrainingError, Engine, WorkerHungError
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.errors import NotReadyError
from gradtrace_service.http.metrics import CONTENT_TYPE
from gradtrace_service.http.problems import error_responses

open_router = APIRouter()  # asked without a key
metrics_router = APIRouter()


@open_router.get("/healthz")
async def healthz() -> Status:
    """The process is alive."""
    return Status(status="ok")


@open_router.get("/readyz", responses=error_responses(503))
async def readyz(request: Request) -> Status:
    """Queries are being answered: the index is loaded, the first query was answered, and the service is not ending."""
    engine: Engine = request.app.state.engine
    if engine.leaving or engine.draining:
        raise DrainingError
    if engine.hung:
        raise WorkerHungError
    if not request.app.state.ready:
        raise NotReadyError(max((opening.seconds for opening in engine.openings().values()), default=0.0))
    states = engine.states().values()
    if states and all(state is None for state in states):
        raise IndexUnavailableError
    return Status(status="ready")


@metrics_router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts and times, for Prometheus."""
    return Response(await request.app.state.metrics.render(), media_type=CONTENT_TYPE)
