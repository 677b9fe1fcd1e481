"""Queries to an index, and the list of indexes, over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gradtrace_client.comparison_schemas import CompareRequest, ComparisonAnswer
from gradtrace_client.completion_schemas import CompletionAnswer, CompletionRequest
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, PairsAnswer
from gradtrace_client.removal_schemas import RemovalAnswer
from gradtrace_client.request_schemas import (
    SOURCES,
    GroupsRequest,
    InfluenceRequest,
    PairsRequest,
    RemovalRequest,
    SelfInfluenceRequest,
    TokensRequest,
)
from gradtrace_client.schemas import IndexDetails, InfluenceAnswer, SelfInfluenceAnswer
from gradtrace_client.service_schemas import Indexes
from gradtrace_client.token_schemas import TokensAnswer
from gradtrace_service.answers import comparisons, completions, groups_and_pairs, rows
from gradtrace_service.answers import index_details as details
from gradtrace_service.answers import influence as answers
from gradtrace_service.answers import removal as removals
from gradtrace_service.answers import tokens as token_scores
from gradtrace_service.engine.work import Work
from gradtrace_service.http.html_answers import HTML_RESPONSE, html_answer, wants_html
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.timed_engine import Choice, Workers

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/influence",
    response_model=InfluenceAnswer,
    responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504) | HTML_RESPONSE,
)
async def influence(
    request: InfluenceRequest, engine: Workers, asked: Request, response: Response
) -> InfluenceAnswer | Response:
    """The training rows that most lowered (proponents) and most raised (opponents) what each query is explained for.

    With `Accept: text/html`, the answer is one HTML document, with its pictures, to be kept or sent to others.
    """
    key = None if request.aggregate else _batch_key(request)
    answer = await engine.run_in_passes(
        request, lambda part: Work(request.index, answers.influence, part, part.queries, key)
    )
    return await html_answer(answer, response) if wants_html(asked) else answer


@router.post("/influence/groups", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_groups(request: GroupsRequest, engine: Workers) -> GroupsAnswer:
    """Sums of the scores of the training rows that share a label, or another column's value, on each query."""
    return await engine.run_in_passes(request, lambda part: Work(request.index, groups_and_pairs.groups, part))


@router.post("/influence/pairs", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_pairs(request: PairsRequest, engine: Workers) -> PairsAnswer:
    """The scores of given training examples, which need not be in the training set, on each query."""
    return await engine.run(Work(request.index, groups_and_pairs.pairs, request))


@router.post("/influence/removal", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_removal(request: RemovalRequest, engine: Workers) -> RemovalAnswer:
    """How much the loss on each query would change if training rows were left out of the training, as predicted."""
    return await engine.run_in_passes(request, lambda part: Work(request.index, removals.removal, part))


@router.post("/influence/tokens", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_tokens(request: TokensRequest, engine: Workers) -> TokensAnswer:
    """Which tokens of their texts, and which of the query's, the scores of training rows come from."""
    return await engine.run(Work(request.index, token_scores.tokens, request))


@router.post("/influence/compare", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def influence_compare(request: CompareRequest, engine: Workers) -> ComparisonAnswer:
    """The scores of all training rows by two questions, which may be about two indexes: how alike they are."""
    first = Work(request.first.index, comparisons.first_side, request)
    return await engine.run_both(
        first, lambda side: Work(request.second.index, comparisons.comparison, (request, side))
    )


@router.post("/complete", responses=error_responses(400, 408, 413, 422, 429, 500, 503, 504))
async def complete(request: CompletionRequest, engine: Workers) -> CompletionAnswer:
    """What a language model writes after a prompt, and the example that asks why."""
    return await engine.run(Work(request.index, completions.completion, request))


@router.get("/self-influence", responses=error_responses(422, 429, 500, 503, 504))
async def self_influence(request: Annotated[SelfInfluenceRequest, Query()], engine: Workers) -> SelfInfluenceAnswer:
    """Training rows ordered by their influence on themselves: at the top, mislabelled and unusual ones."""
    return await engine.run(Work(request.index, rows.self_influence, request))


@router.get("/index", responses=error_responses(422, 429, 500, 503, 504))
async def index_details(engine: Workers, choice: Choice) -> IndexDetails:
    """What the index holds, and what may be asked of it."""
    return await engine.run(Work(choice.index, details.index_details))


@router.get("/indexes", responses=error_responses(500))
def indexes(request: Request) -> Indexes:
    """The indexes that requests may name; the first is the default."""
    return Indexes(indexes=request.app.state.summaries())


def _batch_key(request: InfluenceRequest) -> tuple[str, frozenset[str]]:
    """Everything of a request but its queries: requests of equal keys are answered in one pass."""
    return request.model_dump_json(exclude={*SOURCES, "include"}), request.include  # as text, sets have no one order
