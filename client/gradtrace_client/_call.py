"""One exchange with the service: what is sent, and how its outcome becomes a typed answer or an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Generic, Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from gradtrace_client._errors import ProtocolError, UnreachableError, problem_error
from gradtrace_client._retry import retry_after
from gradtrace_client.problem_schemas import Problem
from gradtrace_client.service_schemas import VERSION_HEADER

Answer = TypeVar("Answer", bound=BaseModel)

VERSION = version("gradtrace-client")


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One HTTP exchange and the type of its answer. `repeatable`: it only reads, so it may be sent again."""

    verb: Literal["GET", "POST"]
    path: str
    answer: type[Answer]
    json: dict[str, Any] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = True

    def result(self, outcome: httpx.Response | httpx.RequestError) -> Answer:
        """The typed answer.

        Raises:
            UnreachableError: `outcome` is no response.
            ProblemError: the service refused.
            ProtocolError: the answer does not parse, or the service is of another major version.
        """
        if isinstance(outcome, httpx.DecodingError):
            raise ProtocolError(
                f"{_address(outcome)} answered with what cannot be decompressed: {outcome}"
            ) from outcome
        if isinstance(outcome, httpx.RequestError):
            cause = f"{type(outcome).__name__}: {outcome}"
            raise UnreachableError(
                f"no answer from {_address(outcome)} ({cause}); is `gradtrace serve` running there?"
            ) from outcome
        _check_version(outcome)
        if outcome.is_error:
            raise problem_error(_problem(outcome), retry_after(outcome), _versions(outcome))
        try:
            return self.answer.model_validate_json(outcome.content)
        except ValidationError as error:
            raise ProtocolError(
                f"{outcome.url} did not answer with a {self.answer.__name__} of this API{_versions(outcome)}: {error}"
            ) from None


def _check_version(response: httpx.Response) -> None:
    """A response without a version is judged by what it says: a proxy may have dropped the header, or have made it."""
    theirs = response.headers.get(VERSION_HEADER, VERSION)
    major = theirs.partition(".")[0]
    if major != VERSION.partition(".")[0]:
        raise ProtocolError(
            f"{response.url} is a service of Gradtrace {theirs}, and this is gradtrace-client {VERSION}; only equal "
            f"major versions understand each other: pip install 'gradtrace-client=={major}.*'"
        )


def _versions(response: httpx.Response) -> str:
    """Which versions speak here, where they differ: the later one may say what the other does not know."""
    theirs = response.headers.get(VERSION_HEADER, VERSION)
    return "" if theirs == VERSION else f" (the service is Gradtrace {theirs}, this is gradtrace-client {VERSION})"


def _problem(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        return Problem(
            type="about:blank",
            title=f"{response.status_code} {response.reason_phrase}",
            status=response.status_code,
            detail=f"{response.url} answered without a problem document, as no Gradtrace service does: check host "
            f"and port. It said {response.text[:200]!r}",
        )


def _address(error: httpx.RequestError) -> str:
    """Where the request went; errors raised outside a request do not say."""
    try:
        return str(error.request.url)
    except RuntimeError:
        return "the service"
