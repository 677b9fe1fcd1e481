"""The answer to POST /complete: what the model writes after a prompt."""

from __future__ import annotations

import time

from gradtrace import Index
from gradtrace.errors import QueryError
from gradtrace_client.completion_schemas import CompletionAnswer, CompletionRequest
from gradtrace_service.answers import documents
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError
from gradtrace_service.ops.timings import milliseconds_since

_SECONDS = 20.0  # for one text: other requests wait meanwhile


@each_alone
def completion(index: Index, request: CompletionRequest, waited_ms: float) -> CompletionAnswer:
    """Raises FieldError where the model does not write, or not after this prompt."""
    started = time.perf_counter()
    field = "prompt" if request.messages is None else "messages"
    prompt = request.prompt if request.messages is None else [message.model_dump() for message in request.messages]
    if prompt is None or (request.prompt is not None and request.messages is not None):
        raise FieldError(field, "give exactly one of prompt and messages")
    options = request.model_dump(include={"max_tokens", "temperature", "seed"})
    try:
        written = index.complete(prompt, **options, seconds=_SECONDS)
    except QueryError as error:
        raise FieldError(field, str(error)) from error
    return documents.document(
        CompletionAnswer,
        written,
        index=documents.index_info(index),
        timing_ms=documents.timing(waited_ms, search=milliseconds_since(started)),
    )
