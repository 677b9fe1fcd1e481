"""The wire schemas of refusals, and how pydantic's validation errors are converted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from gradtrace_client.schemas import AnswerSchema


class FieldProblem(AnswerSchema):
    field: str = Field(description="Path of the field, such as `filter.labels[1]`; empty for the request as a whole.")
    detail: str


class Problem(AnswerSchema):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = Field(default_factory=list)
    request_id: str | None = Field(None, description="Identifies the request in the service's log.")


def field_problems(errors: Iterable[Mapping[str, Any]]) -> list[FieldProblem]:
    """Pydantic's validation errors as field problems; each names the field and what it accepts."""
    return [FieldProblem(field=_field_path(error["loc"]), detail=_remedy(error)) for error in errors]


def _field_path(location: Iterable[str | int]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def _remedy(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field: leave it out"
    return str(error["msg"]).removeprefix("Value error, ")
