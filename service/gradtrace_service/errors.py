"""Why the service refuses a request."""

from __future__ import annotations

from gradtrace.errors import QueryError


class FieldError(QueryError):
    """A field of the request asks for something that cannot be done."""

    status, kind = 422, "invalid-request"

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, str]]:  # how a worker process sends it
        return type(self), (self.field, self.detail)


class NoSuchRowError(FieldError):
    """The address names a row that does not exist."""

    status, kind = 404, "not-found"


class NoSuchJobError(FieldError):
    """The address names a job that does not exist."""

    status, kind = 404, "not-found"

    def __init__(self, job: str) -> None:
        super().__init__("job", f"there is no job {job!r}; GET /jobs lists those that are kept")


class OtherJobError(FieldError):
    """Another job is running on the index, which has one writer."""

    status, kind = 409, "conflict"

    def __init__(self, job: str, operation: str, field: str) -> None:
        super().__init__(field, f"job {job} ({operation}) is running on this index; wait until it ends")


class NotReadyError(Exception):
    """The service is still loading its index.

    seconds: for how long an index has been opening
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(f"an index has been opening for {seconds:.0f} s" if seconds >= 1 else "")
