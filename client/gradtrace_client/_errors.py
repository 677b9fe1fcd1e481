"""The errors that the client raises.

ClientError
├── UnreachableError          no answer came: the connection failed or took too long
├── ProtocolError             the answer does not fit this API, or the service has another major version
├── JobFailedError            the job that was waited for failed; `job` is its last state
├── NotTakenOverError         the job succeeded, but the service does not serve the new generation
└── ProblemError              the service refused, with a problem document (RFC 9457)
    ├── InvalidRequestError   400, 405, 413, 422 ...: the request itself; `errors` names the fields
    │   └── ConflictError     409: others have changed something since; `conflicts` has the marks that are there now
    ├── AuthenticationError   401: the API key is missing or wrong
    ├── ForbiddenError        403: the API key is not allowed to do this
    ├── NotFoundError         404: no such row, job or address
    ├── BusyError             429, 503: the service is busy; `retry_after` says when to ask again, if it is known
    ├── DeadlineError         504: the answer took longer than requests may
    └── ServiceError          500 and the like: the service failed
"""

from __future__ import annotations

from gradtrace_client.service_schemas import FieldProblem, Job, Problem
from gradtrace_client.state_schemas import MarksConflict


class ClientError(Exception):
    """Base of the client's errors."""


class UnreachableError(ClientError):
    """No answer came: the connection failed or took too long, retries included."""


class ProtocolError(ClientError):
    """The answer does not fit this API: it came from another server, a proxy, or another major version."""


class JobFailedError(ClientError):
    """The job that was waited for failed; the index is unchanged. `job` is its last state, `job.error` says why."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.operation} of index {job.index} failed after {job.attempts} attempts: {job.error}")
        self.job = job


class NotTakenOverError(ClientError):
    """The job that was waited for succeeded, but the service still serves an earlier generation. `job` is its last
    state."""

    def __init__(self, job: Job, seconds: float) -> None:
        super().__init__(
            f"generation {job.generation} of index {job.index} is published, but the service has not taken it over "
            f"within {seconds:g} s: opening it takes longer (then give a larger take_over_timeout) or failed (then the "
            "service's log says why)"
        )
        self.job = job


class ProblemError(ClientError):
    """The service refused. `problem` is its document, from which `status`, `detail` and `errors` are taken."""

    def __init__(self, problem: Problem, retry_after: float | None = None, versions: str = "") -> None:
        unmentioned = (error for error in problem.errors if error.detail not in problem.detail)
        fields = "".join(f"\n  {error.field or 'request'}: {error.detail}" for error in unmentioned)
        super().__init__(f"{problem.title}: {problem.detail}{fields}{versions}")
        self.problem, self.status, self.detail, self.errors = problem, problem.status, problem.detail, problem.errors
        self.retry_after = retry_after


class InvalidRequestError(ProblemError):
    """The request is invalid (any other 4xx); `errors` names the fields. Also raised before a request is sent."""


class ConflictError(InvalidRequestError):
    """Others have changed something since, or another job is running (409). Of marks, `conflicts` has what is there
    now; at most 50, of `conflicts_total`."""

    def __init__(self, problem: Problem, retry_after: float | None = None, versions: str = "") -> None:
        super().__init__(problem, retry_after, versions)
        known = problem if isinstance(problem, MarksConflict) else None
        self.conflicts = [] if known is None else known.conflicts
        self.conflicts_total = 0 if known is None else known.conflicts_total


class AuthenticationError(ProblemError):
    """The API key is missing or wrong (401)."""


class ForbiddenError(ProblemError):
    """The API key is not allowed to do this (403)."""


class NotFoundError(ProblemError):
    """There is no such row, job or address (404)."""


class BusyError(ProblemError):
    """The service is busy (429, 503), and still was after the retries. `retry_after`: seconds to wait, if known."""


class DeadlineError(ProblemError):
    """The answer took longer than the service allows (504): ask for less at a time."""


class ServiceError(ProblemError):
    """The service failed (any other 5xx)."""


_BY_STATUS: dict[int, type[ProblemError]] = {
    401: AuthenticationError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    429: BusyError,
    503: BusyError,
    504: DeadlineError,
}


def problem_error(problem: Problem, retry_after: float | None = None, versions: str = "") -> ProblemError:
    """The error for the problem's status.

    versions: text that names the versions of client and service, if they differ
    """
    other = InvalidRequestError if problem.status < 500 else ServiceError
    return _BY_STATUS.get(problem.status, other)(problem, retry_after, versions)


def not_sent(*errors: FieldProblem) -> InvalidRequestError:
    """The error for a request that was not sent, because the service would refuse it."""
    detail = "not sent: the request does not fit the API"
    return InvalidRequestError(
        Problem(type="about:blank", title="Invalid request", status=422, detail=detail, errors=list(errors))
    )
