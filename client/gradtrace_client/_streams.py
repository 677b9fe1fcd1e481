"""More than one request may ask for, in pages: each generator yields the call for a page and is sent its answer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from itertools import islice
from typing import Any

from gradtrace_client import _calls
from gradtrace_client._call import Call
from gradtrace_client._errors import not_sent
from gradtrace_client.problem_schemas import FieldProblem
from gradtrace_client.schemas import (
    MAX_K,
    MAX_QUERIES,
    InfluenceAnswer,
    SelfInfluenceAnswer,
)


def stream_influence(
    examples: Iterable[Mapping[str, Any]] | None = None,
    *,
    query_rows: Iterable[int] | None = None,
    train_rows: Iterable[int] | None = None,
    k: int = 10,
    page: int | None = None,
    **options: Any,
) -> Generator[Call[InfluenceAnswer], InfluenceAnswer, None]:
    """The influence on any number of queries, one result each and in their order, in bounded memory: queries are taken
    from exactly one of the iterables, and sent, `page` at a time. When the index changes meanwhile, later pages are of
    its new generation.

    Args:
        page: Queries a request, at most 128. Default: as many as have 1,000 hits at either end.
        options: Those of `influence`, but for `aggregate`.

    Raises:
        ClientError: see the tree in `gradtrace_client`, when the page is asked for; InvalidRequestError names fields.
    """
    given = {"examples": examples, "query_rows": query_rows, "train_rows": train_rows}
    sources = {name: iter(source) for name, source in given.items() if source is not None}
    if len(sources) != 1:
        raise not_sent([FieldProblem(field="", detail=f"give exactly one of {', '.join(given)}")])
    if "aggregate" in options:
        raise not_sent([FieldProblem(field="aggregate", detail="is of one request: call `influence` for a mean")])
    ((name, queries),) = sources.items()
    if page is not None and page < 1:
        raise not_sent([FieldProblem(field="page", detail="must be at least 1")])
    size = page or min(MAX_QUERIES, MAX_K // max(1, min(k, MAX_K)))
    while some := list(islice(queries, size)):
        yield _calls.influence(k=k, **{**options, name: some})


def stream_self_influence(
    *, page: int = MAX_K, **options: Any
) -> Generator[Call[SelfInfluenceAnswer], SelfInfluenceAnswer, None]:
    """All training rows, ordered by their influence on themselves, in bounded memory.

    Args:
        page: Rows a request, at most 1,000.
        options: Those of `self_influence`, but for `k` and `offset`.

    Raises:
        ClientError: see the tree in `gradtrace_client`, when the page is asked for.
    """
    offset, rows = 0, 1
    while offset < rows:
        answer = yield _calls.self_influence(k=page, offset=offset, **options)
        offset, rows = offset + page, answer.rows_total
