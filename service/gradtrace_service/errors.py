"""Why the service refuses a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradtrace.errors import QueryError

if TYPE_CHECKING:
    from gradtrace_client.state_schemas import MarkConflict


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
    """Another job is running: an index has one writer, and a service retrains one model at a time."""

    status, kind = 409, "conflict"

    def __init__(self, field: str, job: str, what: str) -> None:
        super().__init__(field, f"job {job} ({what}) is running; wait until it ends")


class NotReadyError(Exception):
    """The service is still loading its index.

    seconds: for how long an index has been opening
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(f"an index has been opening for {seconds:.0f} s" if seconds >= 1 else "")


class StateError(Exception):
    """What people keep in the service cannot be read or written now; queries are answered all the while."""

    status, kind = 503, "state-unavailable"


class StateUnavailableError(StateError):
    """The state file is damaged, read-only, or of another program or release."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"marks and questions are kept in a file that fails: {detail}")


class StateFullError(StateError):
    """The disk of the state file is full."""

    status, kind = 507, "state-full"

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"nothing was kept, because the file of marks and questions fails: {detail}. The disk or a quota may be "
            "full: free some space and send the request again"
        )


class StateBusyError(StateError):
    """The state file is in use for too long."""

    kind = "busy"


class NoSuchChangeError(FieldError):
    """The change was never made on this index's data set, or was too long ago."""

    status, kind = 404, "not-found"

    def __init__(self, change: int) -> None:
        super().__init__("change", f"there is no change {change} of this index's marks that can still be undone")


class NoSuchQuestionError(FieldError):
    """The address names a question that does not exist."""

    status, kind = 404, "not-found"

    def __init__(self, question: int) -> None:
        super().__init__("question", f"there is no saved question {question}; GET /questions lists them")


class MarksConflictError(Exception):
    """Others have changed marks since the caller saw them. conflicts: these rows, with what is there now"""

    def __init__(self, conflicts: list[MarkConflict]) -> None:
        super().__init__("others have changed marks since; nothing was changed")
        self.conflicts = conflicts
