"""Everything the client raises on purpose.

ClientError
├── UnreachableError          no answer came: the connection failed or took too long
├── ProtocolError             an answer came that is not one of this API's
└── ProblemError              the service refused, with a problem document (RFC 9457)
    ├── InvalidRequestError   400, 413, 422: the request itself; `errors` names the fields
    ├── AuthenticationError   401, 403: the API key
    ├── NotFoundError         404: no such row or address
    ├── BusyError             429, 503: later; `retry_after` says when, where the service said so
    └── ServiceError          any other status: the service failed
"""

from __future__ import annotations

from gradtrace_client.schemas import FieldProblem, Problem


class ClientError(Exception):
    """Base of every error that the client raises on purpose."""


class UnreachableError(ClientError):
    """No answer came: the connection failed or took too long, retries included."""


class ProtocolError(ClientError):
    """An answer came that is not one of this API's: another server, a proxy, or another major version."""


class ProblemError(ClientError):
    """The service refused. `problem` is its document; `status`, `detail` and `errors` are taken from it."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        fields = "".join(f"\n  {error.field or 'request'}: {error.detail}" for error in problem.errors)
        super().__init__(f"{problem.title}: {problem.detail}{fields}")
        self.problem = problem
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return self.problem.status

    @property
    def detail(self) -> str:
        return self.problem.detail

    @property
    def errors(self) -> list[FieldProblem]:
        return self.problem.errors


class InvalidRequestError(ProblemError):
    """The request itself is at fault (400, 413, 422); `errors` names the fields. Also raised before sending."""


class AuthenticationError(ProblemError):
    """The API key is missing, wrong, or not allowed to do this (401, 403)."""


class NotFoundError(ProblemError):
    """There is no such row or address (404)."""


class BusyError(ProblemError):
    """The service cannot answer now (429, 503), and still could not after the retries."""


class ServiceError(ProblemError):
    """The service failed (any other status)."""


_BY_STATUS: dict[int, type[ProblemError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: BusyError,
    503: BusyError,
}


def problem_error(problem: Problem, retry_after: float | None = None) -> ProblemError:
    """The error that stands for the problem's status."""
    return _BY_STATUS.get(problem.status, ServiceError)(problem, retry_after)
