"""Whether the service lives and answers, over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from gradtrace_client.service_schemas import Status
from gradtrace_service.engine.engine import DrainingError
from gradtrace_service.errors import NotReadyError
from gradtrace_service.http.problems import error_responses

router = APIRouter()


@router.get("/healthz")
async def healthz() -> Status:
    """The process is alive."""
    return Status(status="ok")


@router.get("/readyz", responses=error_responses(503))
async def readyz(request: Request) -> Status:
    """Queries are being answered: the index is loaded, the first query was answered, and the service is not ending."""
    if request.app.state.engine.draining:
        raise DrainingError
    if not request.app.state.ready:
        raise NotReadyError
    return Status(status="ready")


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")
