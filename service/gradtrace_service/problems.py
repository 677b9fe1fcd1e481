"""Every refusal as a problem document (RFC 9457) that names the field and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gradtrace.errors import QueryError, TaskError
from gradtrace_client.schemas import FieldProblem, Problem, field_problems
from gradtrace_service.engine import DeadlineError, QueueFullError, WorkerLostError, WorkFailedError
from gradtrace_service.work import IndexUnavailableError

RETRY_AFTER_SECONDS = 1
_MEDIA_TYPE = "application/problem+json"
_REMEDIES = {  # of what the framework refuses in a word
    400: "the body cannot be read as JSON; send one JSON object",
    404: "there is nothing at this address; /docs lists the addresses",
    405: "this address takes other methods; the Allow header and /docs list them",
}


class FieldError(QueryError):
    """A field of the request cannot be met."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, str]]:  # from a process that answers
        return type(self), (self.field, self.detail)


class NoSuchRowError(FieldError):
    """The address names a row that is not there."""


class NoSuchJobError(FieldError):
    """The address names a job that is not there."""

    def __init__(self, job: str) -> None:
        super().__init__("job", f"there is no job {job!r}; GET /jobs lists those that are kept")


class NotReadyError(Exception):
    """The service is still loading its index."""


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the refusals with these statuses."""
    content = {_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase, "content": content} for status in statuses
    }


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every error that a route raises with a problem document."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(QueryError, _refused)
    app.add_exception_handler(TaskError, _refused)
    app.add_exception_handler(QueueFullError, _busy)
    app.add_exception_handler(DeadlineError, _late)
    app.add_exception_handler(NotReadyError, _not_ready)
    app.add_exception_handler(WorkerLostError, _lost)
    app.add_exception_handler(IndexUnavailableError, _unavailable)
    app.add_exception_handler(WorkFailedError, _failed)
    app.add_exception_handler(Exception, _failed)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        position, cause = errors[0]["loc"][-1], errors[0]["ctx"]["error"]
        return _problem(422, "invalid-request", f"the body is not JSON: {cause} at character {position}")
    if tuple(errors[0]["loc"]) == ("body",) and errors[0]["type"] != "value_error":
        return _problem(422, "invalid-request", "send a JSON object as the body, with Content-Type: application/json")
    fields = field_problems({**one, "loc": one["loc"][1:]} for one in errors)  # the first part says body or query
    return _problem(422, "invalid-request", "the request does not fit the API; /docs describes it", fields)


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, FieldError):
        status, kind = (
            (404, "not-found") if isinstance(error, NoSuchRowError | NoSuchJobError) else (422, "invalid-request")
        )
        return _problem(status, kind, str(error), [FieldProblem(field=error.field, detail=error.detail)])
    return _problem(422, "invalid-request", str(error))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    return _problem(error.status_code, kind, _REMEDIES.get(error.status_code, error.detail), headers=error.headers)


def _busy(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return _problem(429, "busy", "too many requests are waiting; send this one again later", headers=headers)


def _late(request: Request, error: Exception) -> Response:
    return _problem(
        504, "deadline", "the answer took longer than requests may; ask for less, or again when it is calmer"
    )


def _not_ready(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return _problem(503, "starting", "the service is loading its index; ask again soon", headers=headers)


def _lost(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return _problem(503, "worker-lost", "the process that was at it was killed; send it again", headers=headers)


def _unavailable(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    detail = "the index cannot be opened as it is now; the service's log says why, and it is tried again once repaired"
    return _problem(503, "index-unavailable", detail, headers=headers)


def _failed(request: Request, error: Exception) -> Response:
    return _problem(500, "failure", "the service failed on this request; its log says why")


def _problem(
    status: int,
    kind: str,
    detail: str,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    problem = Problem(
        type=f"urn:gradtrace:problem:{kind}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        errors=list(errors),
    )
    return Response(problem.model_dump_json(), status, dict(headers or {}), _MEDIA_TYPE)
