"""Looking through the data sets of an index, over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from gradtrace_client.browse_requests import ColumnsRequest, ExamplesRequest
from gradtrace_client.browse_schemas import ColumnsAnswer, ExamplesAnswer, Overview
from gradtrace_client.schemas import ExampleAnswer, Split
from gradtrace_service.answers import browsed, examples
from gradtrace_service.answers.columns import columns as columns_answer
from gradtrace_service.answers.overview import overview as overview_answer
from gradtrace_service.engine.work import Work
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.timed_engine import Choice, Workers

router = APIRouter(route_class=JsonRoute)


@router.get("/examples/{split}", responses=error_responses(422, 429, 500, 503, 504))
async def list_examples(split: Split, request: Annotated[ExamplesRequest, Query()], engine: Workers) -> ExamplesAnswer:
    """Rows of the training or the query data set that meet some conditions, one page of them."""
    answer = await engine.run(Work(request.index, examples.list_examples, (split, request)))
    if answer.pending:
        engine.go_on(Work(request.index, browsed.go_on))
    return answer


@router.get("/examples/{split}/{row}", responses=error_responses(404, 422, 429, 500, 503, 504))
async def example(
    split: Split, row: Annotated[int, Path(ge=0, lt=2**53)], engine: Workers, choice: Choice
) -> ExampleAnswer:
    """One row of the training or the query data set, for display."""
    return await engine.run(Work(choice.index, examples.example, (split, row)))


@router.get("/columns/{split}", response_model=ColumnsAnswer, responses=error_responses(422, 429, 500, 503, 504))
async def columns(split: Split, request: Annotated[ColumnsRequest, Query()], engine: Workers) -> Response:
    """Labels, losses, self-influence or features of many rows at once, for charts and maps."""
    answer = await engine.run(Work(request.index, columns_answer, (split, request)))
    if answer.pending:
        engine.go_on(Work(request.index, browsed.go_on))
    return Response(answer.body, media_type="application/json")


@router.get("/overview", responses=error_responses(422, 429, 500, 503, 504))
async def overview(engine: Workers, choice: Choice) -> Overview:
    """An index at a glance: rows and losses by class, by checkpoint, and their distribution."""
    answer = await engine.run(Work(choice.index, overview_answer))
    if answer.pending:
        engine.go_on(Work(choice.index, browsed.go_on))
    return answer
