"""What a page asks about the service itself, over HTTP: who its caller is, and what has changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Depends, Request
from fastapi.sse import EventSourceResponse

from gradtrace_client.state_schemas import ServiceEvent, WhoAmI
from gradtrace_service.http.api_keys import Scope
from gradtrace_service.http.keeping import key_name, key_of
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.streams import one_stream
from gradtrace_service.indexes.changes import Changes
from gradtrace_service.state.database import Database

router = APIRouter()


@router.get("/whoami", responses=error_responses(500))
async def whoami(request: Request) -> WhoAmI:
    """What the service knows of its caller. Any valid key may ask."""
    database: Database | None = request.app.state.database
    key = key_of(request)
    return WhoAmI(
        name=key_name(request),
        scopes=sorted(scope.value for scope in (Scope if key is None else key.scopes)),
        keys_required=key is not None,
        read_only=database is None or await database.is_read_only(),
        started=request.app.state.started,
    )


@router.get(
    "/events",
    response_class=EventSourceResponse,
    responses=error_responses(429, 500, 503),
    dependencies=[Depends(one_stream)],
)
async def events(request: Request) -> AsyncIterator[ServiceEvent]:
    """Changes of marks, questions, jobs and generations from now on, as server-sent events."""
    changes: Changes = request.app.state.changes
    async with aclosing(changes.follow()) as followed:
        async for event in followed:
            yield event
