"""The generations of indexes, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

from fastapi import APIRouter, Request

from gradtrace_client.service_schemas import Generations
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.timed_engine import Choice
from gradtrace_service.indexes.history import generations
from gradtrace_service.indexes.hosted import Hosted, known_name

router = APIRouter(route_class=JsonRoute)


@router.get("/generations", responses=error_responses(422, 500, 503))
async def list_generations(request: Request, choice: Choice) -> Generations:
    """The generations of an index: the current one, and the earlier ones that it may be rolled back to."""
    hosted = cast(Mapping[str, Hosted], request.app.state.hosted)
    return await asyncio.to_thread(generations, hosted[known_name(hosted, choice.index)].path)
