"""Each call of the API, once: what it sends and what comes back. Sync and async clients only differ in who waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from gradtrace_client._errors import InvalidRequestError, ProtocolError, UnreachableError, problem_error
from gradtrace_client._retry import retry_after
from gradtrace_client.schemas import (
    Aggregate,
    ExampleAnswer,
    FieldProblem,
    Include,
    IndexDetails,
    InfluenceAnswer,
    InfluenceRequest,
    Order,
    Problem,
    RowFilter,
    SelfInfluenceAnswer,
    SelfInfluenceRequest,
    Similarity,
    Split,
    Weights,
    field_problems,
)

Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One HTTP exchange and the type of its answer. All calls only read, so each may be sent again."""

    verb: Literal["GET", "POST"]
    path: str
    answer: type[Answer]
    json: dict[str, Any] | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def result(self, outcome: httpx.Response | httpx.TransportError) -> Answer:
        """The typed answer.

        Raises:
            UnreachableError: `outcome` is no response.
            ProblemError: the service refused.
            ProtocolError: the answer does not parse.
        """
        if isinstance(outcome, httpx.TransportError):
            cause = f"{type(outcome).__name__}: {outcome}"
            raise UnreachableError(
                f"no answer from {_address(outcome)} ({cause}); is `gradtrace serve` running there?"
            ) from outcome
        if outcome.is_error:
            raise problem_error(_problem(outcome), retry_after(outcome))
        try:
            return self.answer.model_validate_json(outcome.content)
        except ValidationError as error:
            raise ProtocolError(
                f"{outcome.url} did not answer with a {self.answer.__name__} of this API: {error}"
            ) from None


def influence(
    example: Mapping[str, Any] | None = None,
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    query_rows: Sequence[int] | None = None,
    train_rows: Sequence[int] | None = None,
    k: int = 10,
    method: str = "tracin",
    checkpoints: Sequence[str] | None = None,
    weights: Weights | None = None,
    damping: float | None = None,
    segments: int | None = None,
    similarity: Similarity | None = None,
    filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002
    target: Literal["loss"] | None = None,
    rescore: bool = False,
    aggregate: Aggregate | None = None,
    include: Iterable[Include] = ("parts", "examples"),
) -> Call[InfluenceAnswer]:
    """The k strongest proponents and opponents of each query, which is exactly one of `example`, `examples` (in the
    task's own form, such as `{"image": base64 PNG, "label": 3}`), `query_rows` and `train_rows`.

    Raises:
        ClientError: see the tree in `gradtrace_client`; InvalidRequestError names the fields at fault.
    """
    body = _request(
        InfluenceRequest,
        example=example,
        examples=examples,
        query_rows=query_rows,
        train_rows=train_rows,
        k=k,
        method=method,
        checkpoints=checkpoints,
        weights=weights,
        damping=damping,
        segments=segments,
        similarity=similarity,
        filter=filter,
        target=target,
        rescore=rescore,
        aggregate=aggregate,
        include=frozenset(include),
    )
    return Call("POST", "/influence", InfluenceAnswer, json=body)


def self_influence(
    *,
    k: int = 10,
    offset: int = 0,
    order: Order = "descending",
    labels: Sequence[int | float] | None = None,
    method: str = "tracin",
    checkpoints: Sequence[str] | None = None,
    weights: Weights | None = None,
    damping: float | None = None,
    segments: int | None = None,
    similarity: Similarity | None = None,
    examples: bool = True,
) -> Call[SelfInfluenceAnswer]:
    """One page of the training rows, ordered by their influence on themselves: mislabelled and unusual rows come first.

    Raises:
        ClientError: see the tree in `gradtrace_client`.
    """
    params = _request(
        SelfInfluenceRequest,
        k=k,
        offset=offset,
        order=order,
        labels=labels,
        method=method,
        checkpoints=checkpoints,
        weights=weights,
        damping=damping,
        segments=segments,
        similarity=similarity,
        examples=examples,
    )
    return Call("GET", "/self-influence", SelfInfluenceAnswer, params=params)


def examples(split: Split, row: int) -> Call[ExampleAnswer]:
    """One row of the training or query data set, rendered.

    Raises:
        ClientError: see the tree in `gradtrace_client`; NotFoundError where there is no such row.
    """
    return Call("GET", f"/examples/{split}/{row}", ExampleAnswer)


def index() -> Call[IndexDetails]:
    """What the service's index holds.

    Raises:
        ClientError: see the tree in `gradtrace_client`.
    """
    return Call("GET", "/index", IndexDetails)


def _request(schema: type[BaseModel], **fields: Any) -> dict[str, Any]:
    """The fields as JSON, checked against the schema, without those that have their default."""
    try:
        return schema(**fields).model_dump(mode="json", exclude_defaults=True, by_alias=True)
    except ValidationError as error:
        raise _not_sent(field_problems(error.errors())) from None
    except PydanticSerializationError as error:
        raise _not_sent([FieldProblem(field="", detail=f"examples must be JSON values: {error}")]) from None


def _not_sent(errors: list[FieldProblem]) -> InvalidRequestError:
    detail = "not sent: the request does not fit the API"
    return InvalidRequestError(
        Problem(type="about:blank", title="Invalid request", status=422, detail=detail, errors=errors)
    )


def _problem(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        return Problem(
            type="about:blank",
            title=f"{response.status_code} {response.reason_phrase}",
            status=response.status_code,
            detail=f"{response.url} answered without a problem document: {response.text[:200]!r}",
        )


def _address(error: httpx.TransportError) -> str:
    """Where the request went; errors raised outside a request do not say."""
    try:
        return str(error.request.url)
    except RuntimeError:
        return "the service"
