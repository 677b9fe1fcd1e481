"""Each call of the API, once: what it sends and what comes back. Sync and async clients only differ in who waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from gradtrace_client._call import Call
from gradtrace_client._errors import not_sent
from gradtrace_client._payloads import to_json
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, GroupsRequest, PairsAnswer, PairsRequest
from gradtrace_client.problem_schemas import FieldProblem, field_problems
from gradtrace_client.schemas import (
    Aggregate,
    ExampleAnswer,
    Include,
    IndexDetails,
    InfluenceAnswer,
    InfluenceRequest,
    Order,
    RowFilter,
    SelfInfluenceAnswer,
    SelfInfluenceRequest,
    Similarity,
    Split,
    Weights,
)
from gradtrace_client.service_schemas import Indexes, Job, Jobs, ReindexRequest


def influence(
    example: Mapping[str, Any] | None = None,
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    query_rows: Sequence[int] | None = None,
    train_rows: Sequence[int] | None = None,
    index: str | None = None,
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
    task's own form, such as `{"image": pixels, "label": 3}`), `query_rows` and `train_rows`. In examples, paths and
    bytes stand for files, PIL images for PNG files, and NumPy arrays and tensors for nested lists.

    Raises:
        ClientError: see the tree in `gradtrace_client`; InvalidRequestError names the fields at fault.
    """
    body = _request(
        InfluenceRequest,
        example=example,
        examples=examples,
        query_rows=query_rows,
        train_rows=train_rows,
        index=index,
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


def groups(
    example: Mapping[str, Any] | None = None,
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    query_rows: Sequence[int] | None = None,
    train_rows: Sequence[int] | None = None,
    by: str = "label",
    index: str | None = None,
    method: str = "tracin",
    checkpoints: Sequence[str] | None = None,
    weights: Weights | None = None,
    damping: float | None = None,
    segments: int | None = None,
    similarity: Similarity | None = None,
    filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002
    target: Literal["loss"] | None = None,
    aggregate: Aggregate | None = None,
) -> Call[GroupsAnswer]:
    """Sums of the scores of the training rows that share a value of the column `by`. Queries are as in `influence`.

    Raises:
        ClientError: see the tree in `gradtrace_client`; InvalidRequestError names the fields at fault.
    """
    body = _request(
        GroupsRequest,
        example=example,
        examples=examples,
        query_rows=query_rows,
        train_rows=train_rows,
        by=by,
        index=index,
        method=method,
        checkpoints=checkpoints,
        weights=weights,
        damping=damping,
        segments=segments,
        similarity=similarity,
        filter=filter,
        target=target,
        aggregate=aggregate,
    )
    return Call("POST", "/influence/groups", GroupsAnswer, json=body)


def pairs(
    train_examples: Sequence[Mapping[str, Any]] | None = None,
    *,
    train_rows: Sequence[int] | None = None,
    example: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    query_rows: Sequence[int] | None = None,
    index: str | None = None,
    method: str = "tracin",
    checkpoints: Sequence[str] | None = None,
    weights: Weights | None = None,
    damping: float | None = None,
    segments: int | None = None,
    similarity: Similarity | None = None,
    target: Literal["loss"] | None = None,
) -> Call[PairsAnswer]:
    """The scores of training examples, which need not be in the training set, on the queries: exactly one of `example`,
    `examples` and `query_rows`.

    Raises:
        ClientError: see the tree in `gradtrace_client`; InvalidRequestError names the fields at fault.
    """
    body = _request(
        PairsRequest,
        train_examples=train_examples,
        train_rows=train_rows,
        example=example,
        examples=examples,
        query_rows=query_rows,
        index=index,
        method=method,
        checkpoints=checkpoints,
        weights=weights,
        damping=damping,
        segments=segments,
        similarity=similarity,
        target=target,
    )
    return Call("POST", "/influence/pairs", PairsAnswer, json=body)


def self_influence(
    *,
    index: str | None = None,
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
        index=index,
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


def examples(split: Split, row: int, *, index: str | None = None) -> Call[ExampleAnswer]:
    """One row of the training or query data set, rendered.

    Raises:
        ClientError: see the tree in `gradtrace_client`; NotFoundError where there is no such row.
    """
    return Call("GET", f"/examples/{split}/{row}", ExampleAnswer, params=_named(index))


def index(name: str | None = None) -> Call[IndexDetails]:
    """What an index of the service holds; None: its only or first one.

    Raises:
        ClientError: see the tree in `gradtrace_client`.
    """
    return Call("GET", "/index", IndexDetails, params=_named(name))


def indexes() -> Call[Indexes]:
    """The indexes of the service, of which the first is the default.

    Raises:
        ClientError: see the tree in `gradtrace_client`.
    """
    return Call("GET", "/indexes", Indexes)


def reindex(index: str | None = None, *, roll_back_to: int | None = None) -> Call[Job]:
    """Start a job that brings an index up to date with its training run and data, or back to an earlier generation.

    One that is at this already is answered instead, and one that is at another is a refusal (409). It is not sent again
    where its answer was lost.

    Raises:
        ClientError: see the tree in `gradtrace_client`; NotFoundError where the service offers no jobs.
    """
    body = _request(ReindexRequest, index=index, roll_back_to=roll_back_to)
    return Call("POST", "/reindex", Job, json=body, repeatable=False)


def job(job: Job | str) -> Call[Job]:
    """How far a job is, or how it ended; it is named by its id.

    Raises:
        ClientError: see the tree in `gradtrace_client`; NotFoundError where there is no such job.
    """
    return Call("GET", job_path(job), Job)


def jobs() -> Call[Jobs]:
    """The jobs of the service, running and ended, the latest first.

    Raises:
        ClientError: see the tree in `gradtrace_client`; NotFoundError where the service offers no jobs.
    """
    return Call("GET", "/jobs", Jobs)


def job_path(job: Job | str) -> str:
    return f"/jobs/{quote(job if isinstance(job, str) else job.id, safe='')}"


def _named(index: str | None) -> dict[str, Any]:
    return {} if index is None else {"index": index}


def _request(schema: type[BaseModel], **fields: Any) -> dict[str, Any]:
    """The fields as JSON values (NaN as null), checked against the schema, without those that have their default."""
    try:
        return schema(**to_json(fields)).model_dump(mode="json", exclude_defaults=True, by_alias=True)
    except ValidationError as error:
        raise not_sent(field_problems(error.errors())) from None
    except PydanticSerializationError as error:
        raise not_sent([FieldProblem(field="", detail=f"examples must be JSON values: {error}")]) from None
