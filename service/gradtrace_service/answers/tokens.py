"""The answer to POST /influence/tokens: which tokens the scores of training rows come from."""

from __future__ import annotations

import time

from gradtrace import Index
from gradtrace_client.request_schemas import TokensRequest
from gradtrace_client.token_schemas import RowTokens, TokensAnswer
from gradtrace_service.answers import documents
from gradtrace_service.answers.groups_and_pairs import asked_about
from gradtrace_service.answers.questions import check_names, check_rows, options_of, queries_of, target_of
from gradtrace_service.answers.unfit_queries import named_refusals
from gradtrace_service.engine.work import each_alone
from gradtrace_service.ops.timings import milliseconds_since


@each_alone
def tokens(index: Index, request: TokensRequest, waited_ms: float) -> TokensAnswer:
    """
    Raises:
        FieldError: a field names something that does not exist, or an example that the task or the model cannot take.
        GradtraceError: the index refuses the query, or tells no tokens.
    """
    started = time.perf_counter()
    check_names(index, request.method, request.checkpoints)
    check_rows(index, "rows", request.rows)
    target = target_of(index, request)
    (query,) = queries_of(index, request)
    with named_refusals(index, request, [query]):
        results = index.token_scores(
            query.example, request.rows, method=request.method, **options_of(request), target=target
        )
    return TokensAnswer(
        **documents.head(index, request),
        query=asked_about(index, [query], results[0].target),
        query_tokens=results[0].query.tokens,
        results=[documents.document(RowTokens, result, tokens=result.training.tokens) for result in results],
        timing_ms=documents.timing(waited_ms, 1, gradient=milliseconds_since(started)),
    )
