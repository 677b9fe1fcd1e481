"""Every refusal as a problem document (RFC 9457) that names the field and the remedy."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradtrace.errors import DatasetError, QueryError, ShardLostError, TaskError
from gradtrace_client.service_schemas import (
    LONGEST_DETAIL,
    LONGEST_PATH,
    MAX_PROBLEMS,
    FieldProblem,
    Problem,
    field_problems,
    shortened,
)
from gradtrace_client.state_schemas import MAX_CONFLICTS, MarksConflict
from gradtrace_service.engine.engine import (
    ClientBusyError,
    DeadlineError,
    DrainingError,
    QueueFullError,
    WorkerHungError,
    WorkerLostError,
    WorkFailedError,
)
from gradtrace_service.engine.work import (
    IndexUnavailableError,
    NoMemoryForIndexError,
    OutOfMemoryError,
    is_out_of_memory,
)
from gradtrace_service.errors import FieldError, MarksConflictError, NotReadyError, StateBusyError, StateError

_MEDIA_TYPE = "application/problem+json"
_REMEDIES = {  # for refusals for which the framework gives only a status phrase
    400: "the body cannot be read as JSON; send one JSON object",
    404: "there is nothing at this address; /docs lists the addresses",
    405: "this address takes other methods; the Allow header and /docs list them",
}
_KINDS = {429: "busy", 503: "busy"}
_STATES: dict[type[Exception], tuple[int, str, str]] = {  # of the service, which refuse any request
    QueueFullError: (429, "busy", "too many requests are waiting; send this one again later"),
    ClientBusyError: (429, "busy", "too many requests of this client are in flight; await the answer of one"),
    DeadlineError: (
        504,
        "deadline",
        "the answer took longer than a request may take; ask for less, or at a quiet time",
    ),
    NotReadyError: (503, "starting", "the service is loading its index; ask again soon"),
    DrainingError: (503, "draining", "the service is shutting down; send the request again, to its successor"),
    WorkerHungError: (
        503,
        "worker-hung",
        "the service hangs on another request and is about to be started again; send this one again then",
    ),
    WorkerLostError: (
        500,
        "worker-lost",
        "the process that computes the answer ended on this request, and again when it was tried by itself: it may "
        "lack memory, or the task may end it; ask for less, or another question. The service's log has its id",
    ),
    NoMemoryForIndexError: (
        503,
        "out-of-memory",
        "the service lacks the memory to open this index, and tries again soon; give it more, or fewer indexes",
    ),
    ShardLostError: (
        503,
        "shard-lost",
        "a process that has some of the index's rows ended, and again when it was started anew, and without these rows "
        "nothing is answered; send this request again later. The service's log says which rows",
    ),
    IndexUnavailableError: (
        503,
        "index-unavailable",
        "the index cannot be opened as it is now; the service's log says why, and it is tried again once repaired",
    ),
}

_log = logging.getLogger(__name__)


class AnswerFailures:
    """ASGI middleware: answers exceptions that no handler takes, and re-raises them for the server to log. The
    framework's own answer comes from its outermost layer, and would lack the headers that other middlewares add."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] == "http" and not started:
                await (_no_memory() if is_out_of_memory(error) else _failure())(scope, receive, send)
            raise


def error_responses(*statuses: int, model: type[Problem] = Problem) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the refusals with these statuses."""
    content = {_MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {
        status: {"model": model, "description": HTTPStatus(status).phrase, "content": content} for status in statuses
    }


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every error that a route raises with a problem document."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(QueryError, _refused)
    app.add_exception_handler(TaskError, _refused)
    app.add_exception_handler(DatasetError, _failed)  # about the service's data; its text may name files
    app.add_exception_handler(OutOfMemoryError, _out_of_memory)
    app.add_exception_handler(WorkFailedError, _failed)
    app.add_exception_handler(StateError, _state_file)
    app.add_exception_handler(MarksConflictError, _marks_conflict)
    for kind in _STATES:
        app.add_exception_handler(kind, _state)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return problem(422, "invalid-request", f"the body is not JSON in UTF-8: {errors[0]['ctx']['error']}")
    if tuple(errors[0]["loc"]) == ("body",) and errors[0]["type"] != "value_error":
        return problem(422, "invalid-request", "send a JSON object as the body, with Content-Type: application/json")
    named = [{**detail, "loc": detail["loc"][1:]} for detail in errors]  # the first part says body or query
    return problem(
        422, "invalid-request", "the request does not fit the API; /docs describes it", field_problems(named)
    )


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, FieldError):
        return problem(error.status, error.kind, str(error), [FieldProblem(field=error.field, detail=error.detail)])
    return problem(422, "invalid-request", str(error))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code) or HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    headers = error.headers
    if error.status_code == 405 and (methods := _methods(request)):  # Starlette names those of its first route alone
        headers = {"Allow": ", ".join(methods)}
    return problem(error.status_code, kind, _REMEDIES.get(error.status_code, error.detail), headers=headers)


def _methods(request: Request) -> list[str]:
    """Of the address that is asked, as documented."""
    address = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    documented = request.app.openapi()["paths"].items()
    return sorted(
        method.upper() for path, methods in documented if compile_path(path)[0].match(address) for method in methods
    )


def _state(request: Request, error: Exception) -> Response:
    status, kind, detail = _STATES[type(error)]
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if isinstance(error, NotReadyError) and str(error):
        detail = f"{detail}; {error}"
    return problem(status, kind, detail, headers=headers)


def _state_file(request: Request, error: Exception) -> Response:
    assert isinstance(error, StateError)
    headers = {"Retry-After": "1"} if isinstance(error, StateBusyError) else {}
    return problem(error.status, error.kind, str(error), headers=headers)


def _marks_conflict(request: Request, error: Exception) -> Response:
    assert isinstance(error, MarksConflictError)
    document = _document(409, "conflict", f"{error}; look at `conflicts`, which has what is there now")
    conflicts = {"conflicts": error.conflicts[:MAX_CONFLICTS], "conflicts_total": len(error.conflicts)}
    return _answered(MarksConflict(**document.model_dump(), **conflicts))


def _out_of_memory(request: Request, error: Exception) -> Response:
    _log.error("request %s ran out of memory: %s", correlation_id.get(), error)
    return _no_memory()


def _no_memory() -> Response:
    return problem(500, "out-of-memory", "the service lacks the memory for this request; ask for fewer queries at once")


def _failed(request: Request, error: Exception) -> Response:
    _log.error("request %s failed", correlation_id.get(), exc_info=error.__cause__ or error)
    return _failure()


def _failure() -> Response:
    return problem(500, "failure", "the service failed on this request; its log says why")


def problem(
    status: int,
    kind: str,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A refusal as its problem document; `kind` is the last part of its `type`. Whatever the texts
    quote of the request, it holds a few kilobytes at most."""
    return _answered(_document(status, kind, detail, errors), headers)


def _document(status: int, kind: str, detail: str, errors: Sequence[FieldProblem] = ()) -> Problem:
    return Problem(
        type=f"urn:gradtrace:problem:{kind}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=shortened(detail, LONGEST_DETAIL),
        errors=[
            FieldProblem(field=shortened(error.field, LONGEST_PATH), detail=shortened(error.detail, LONGEST_DETAIL))
            for error in errors[: MAX_PROBLEMS + 1]
        ],
        request_id=correlation_id.get(),
    )


def _answered(document: Problem, headers: Mapping[str, str] | None = None) -> Response:
    # A detail that quotes the request may hold half a surrogate pair: JSON's escapes can write it, UTF-8 cannot.
    content = json.dumps(document.model_dump(mode="json"), ensure_ascii=False).encode(errors="replace")
    return Response(content, document.status, dict(headers or {}), _MEDIA_TYPE)
