"""A request with more queries than a pass answers takes several passes, between which others have their turn.

A pass cannot be interrupted, so the longest one is what a small request may have to wait for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gradtrace_client.group_and_pair_schemas import GroupsAnswer
from gradtrace_client.removal_schemas import RemovalAnswer, mean_of
from gradtrace_client.request_schemas import SOURCES, GroupsRequest, InfluenceRequest, RemovalRequest
from gradtrace_client.schemas import InfluenceAnswer, Timing
from gradtrace_service.errors import FieldError

Q = TypeVar("Q", InfluenceRequest, GroupsRequest, RemovalRequest)
A = TypeVar("A", InfluenceAnswer, GroupsAnswer, RemovalAnswer)

_ELEMENT = re.compile(rf"({'|'.join(SOURCES)})\[(\d+)\]")
_SUMMED = ("queue", "gradient", "search", "rescore", "percentiles", "render", "total")


@dataclass(frozen=True, slots=True)
class Pass(Generic[Q]):
    """request: with the queries of this pass;  first: position of its first query in the whole request"""

    request: Q
    first: int = 0

    def named(self, refusal: FieldError) -> FieldError:
        """The refusal with the field's name in the whole request."""
        field = _ELEMENT.sub(lambda at: f"{at[1]}[{int(at[2]) + self.first}]", refusal.field, count=1)
        return type(refusal)(field, refusal.detail)


def passes_of(request: Q, most: int) -> list[Pass[Q]]:
    """most: queries of a pass. The mean of several queries is computed in one: it is searched for once."""
    if getattr(request, "aggregate", None) or request.queries <= most:
        return [Pass(request)]
    source = next(name for name in SOURCES if getattr(request, name) is not None)
    queries = getattr(request, source)
    return [
        Pass(request.model_copy(update={source: queries[first : first + most]}), first)
        for first in range(0, len(queries), most)
    ]


def outdated(answers: Sequence[InfluenceAnswer | GroupsAnswer | RemovalAnswer]) -> list[int]:
    """Positions of the passes that an earlier generation of the index answered than another of them."""
    newest = max(answer.index.generation for answer in answers)
    return [at for at, answer in enumerate(answers) if answer.index.generation < newest]


def joined(answers: Sequence[A]) -> A:
    """The answer to the whole request, from those of its passes, which are of one generation."""
    first = answers[0]
    if len(answers) == 1:
        return first
    results: list[Any] = [result for answer in answers for result in answer.results]
    together: dict[str, Any] = {
        "results": results,
        "timing_ms": _timing([answer.timing_ms for answer in answers]),
    }
    if isinstance(first, InfluenceAnswer):
        together["exact"] = all(getattr(answer, "exact", True) for answer in answers)
    if isinstance(first, RemovalAnswer):
        together["mean"] = mean_of(results)
    return first.model_copy(update=together)


def _timing(passes: Sequence[Timing]) -> Timing:
    rows_rescored = sum(timing.rescore / timing.rescore_per_row for timing in passes if timing.rescore_per_row)
    sums = {stage: sum(getattr(timing, stage) for timing in passes) for stage in _SUMMED}
    return Timing(
        **sums,
        batch=max(timing.batch for timing in passes),
        rescore_per_row=sums["rescore"] / rows_rescored if rows_rescored else None,
    )
