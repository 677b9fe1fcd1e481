"""The wire schemas of requests that look through the data sets of an index: their query strings, which hold only text.
The service imports them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from gradtrace_client.request_schemas import FEATURE, MAX_K, MAX_NAME, MAX_VALUES, Number, RequestSchema

MAX_TEXT = 200  # characters that are searched for
MAX_POINTS = 100_000  # rows of columns
MAX_POINT_COLUMNS = 8

RowOrder = Literal["row", "-row", "loss", "-loss"]


def _class(value: Any) -> float | str:
    """A number, or the name of a class, from a query string."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("give a number or the name of a class")
    if isinstance(value, str) and len(value) > MAX_NAME:
        raise ValueError(f"the name of a class has at most {MAX_NAME} characters")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    if isinstance(value, str):
        return value
    raise ValueError("give a finite number or the name of a class")


UrlClass = Annotated[
    float | str, PlainValidator(_class), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]
UrlClasses = Annotated[list[UrlClass], Field(min_length=1, max_length=MAX_VALUES, fail_fast=True)]
UrlRow = Annotated[int, Field(ge=0, lt=2**53)]


class BrowseRequest(RequestSchema):
    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")


class ExamplesRequest(BrowseRequest):
    """One page of the rows of a data set that meet every condition given. Unknown values meet no condition."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(50, description="Rows in the answer.")
    offset: Annotated[int, Field(ge=0, lt=2**53)] = Field(0, description="Rows skipped before the first.")
    labels: UrlClasses | None = Field(
        None, description="Only rows with one of these labels; classes also by their names."
    )
    predictions: UrlClasses | None = Field(None, description="Only rows with one of these predictions; likewise.")
    correct: bool | None = Field(None, description="Only rows that the last checkpoint predicts correctly, or wrongly.")
    min_loss: Number | None = Field(None, description="Only rows whose loss is at least this.")
    max_loss: Number | None = Field(None, description="Only rows whose loss is at most this.")
    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = Field(
        None, description="Only rows whose rendering contains each of these words, in upper or lower case."
    )
    rows: Annotated[list[UrlRow], Field(min_length=1, max_length=MAX_K, fail_fast=True)] | None = Field(
        None, description="Only these rows."
    )
    order: RowOrder = Field("row", description="`-` begins with the largest; rows of unknown loss come last.")
    render: bool = Field(True, description="Whether the answer carries the rendered examples.")


class ColumnsRequest(BrowseRequest):
    """Columns of a data set, for charts."""

    names: Annotated[
        list[Annotated[str, Field(max_length=len(FEATURE) + MAX_NAME)]],
        Field(min_length=1, max_length=MAX_POINT_COLUMNS, fail_fast=True),
    ] = Field(
        description="`label`, `prediction`, `loss`, `correct`, of training rows also `norm` and `self_influence` (by "
        "`tracin`), and `feature:NAME` of a table."
    )
    k: Annotated[int, Field(ge=1, le=MAX_POINTS)] = Field(
        MAX_POINTS, description="Rows at most: where there are more, they are evenly spaced."
    )
