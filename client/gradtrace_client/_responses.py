"""What comes back from a service, as a typed answer or as an error."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from gradtrace_client._errors import ClientError, ProtocolError, UnreachableError, problem_error
from gradtrace_client.service_schemas import VERSION_HEADER, Problem
from gradtrace_client.state_schemas import MarksConflict

Answer = TypeVar("Answer", bound=BaseModel)

Verb = Literal["GET", "POST", "PUT", "DELETE"]

VERSION = version("gradtrace-client")


def checked(response: httpx.Response) -> httpx.Response:
    """The response, of a service that answers.

    Raises:
        ProblemError: the service refused.
        ProtocolError: it has another major version.
    """
    _check_version(response)
    if response.is_error:
        raise problem_error(_problem(response), retry_after(response), _versions(response))
    return response


def parse_answer(response: httpx.Response, schema: type[Answer]) -> Answer:
    """The typed answer, of a `checked` response. Raises ProtocolError where it does not fit the schema."""
    try:
        return schema.model_validate_json(response.content)
    except ValidationError as error:
        raise ProtocolError(
            f"{response.url} did not answer with a {schema.__name__} of this API{_versions(response)}: {error}"
        ) from None


def failed_request(error: httpx.RequestError) -> ClientError:
    """The client's error for one of httpx."""
    try:
        address = str(error.request.url)
    except RuntimeError:  # httpx does not always set the request
        address = "the service"
    if isinstance(error, httpx.DecodingError):
        return ProtocolError(f"the answer of {address} cannot be decompressed: {error}")
    return UnreachableError(
        f"no answer from {address} ({type(error).__name__}: {error}); is `gradtrace serve` running there?"
    )


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the Retry-After header asks for, as a number or as a date; None without a valid one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    wait: timedelta = moment - datetime.now(timezone.utc)
    return wait.total_seconds()


def _check_version(response: httpx.Response) -> None:
    """Responses without a version pass: a proxy may have removed the header, or may itself have answered."""
    theirs = response.headers.get(VERSION_HEADER, VERSION)
    major = theirs.partition(".")[0]
    if major != VERSION.partition(".")[0]:
        raise ProtocolError(
            f"{response.url} is a service of Gradtrace {theirs}, and this is gradtrace-client {VERSION}; their major "
            f"versions must be the same: pip install 'gradtrace-client=={major}.*'"
        )


def _versions(response: httpx.Response) -> str:
    """Both versions, if they differ: the later one may use what the other does not know."""
    theirs = response.headers.get(VERSION_HEADER, VERSION)
    return "" if theirs == VERSION else f" (the service is Gradtrace {theirs}, this is gradtrace-client {VERSION})"


def _problem(response: httpx.Response) -> Problem:
    schema = MarksConflict if response.status_code == 409 else Problem
    try:
        return schema.model_validate_json(response.content)
    except ValidationError:
        return Problem(
            type="about:blank",
            title=f"{response.status_code} {response.reason_phrase}",
            status=response.status_code,
            detail=f"{response.url} answered without a problem document, so it is not a Gradtrace service: check host "
            f"and port. It said {response.text[:200]!r}",
        )
