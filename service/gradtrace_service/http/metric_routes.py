"""What Prometheus scrapes, over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gradtrace_service.http.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts and times, for Prometheus."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)
