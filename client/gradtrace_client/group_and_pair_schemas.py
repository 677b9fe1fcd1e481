"""The wire schemas of questions about groups of rows, and about pairs of training examples and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, model_validator

from gradtrace_client import _display
from gradtrace_client._sources import at_least_one, exactly_one, require_one
from gradtrace_client.schemas import (
    MAX_QUERIES,
    IndexInfo,
    Label,
    Payload,
    Queries,
    Question,
    Row,
    Split,
    Timing,
    _Answer,
)

if TYPE_CHECKING:
    import pandas

_QUERY_SOURCES = ("example", "examples", "query_rows")


class GroupsRequest(Queries):
    by: str = Field("label", max_length=64, description="The column whose values make the groups.")


class PairsRequest(Question):
    """Training examples, which need not be in the training set, against queries.

    Exactly one of `example`, `examples` and `query_rows` gives the queries; `train_examples`, `train_rows` or both give
    the training examples.
    """

    model_config = ConfigDict(
        json_schema_extra=exactly_one(_QUERY_SOURCES) | at_least_one(("train_examples", "train_rows"))
    )

    train_examples: list[Payload] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="In the task's own form, with labels."
    )
    train_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the training data set."
    )
    example: Payload | None = Field(None, description="One query in the task's own form.")
    examples: list[Payload] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Several queries in the task's own form."
    )
    query_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the task's query data set."
    )
    target: Literal["loss"] | None = Field(
        None, description="`loss`: explain the loss even where the task defines another measurement."
    )

    @model_validator(mode="after")
    def _both_sides(self) -> PairsRequest:
        require_one(self, _QUERY_SOURCES)
        if self.train_examples is None and self.train_rows is None:
            raise ValueError("give train_examples, train_rows or both")
        return self


class Asked(_Answer):
    """What an example of a request is. `split` and `row` are set where it was asked by row, and alone."""

    split: Split | None
    row: int | None
    label: Label | None
    label_name: str | None
    count: int = Field(default=1, description="Queries whose mean it is; labels are those that all share.")


class Group(_Answer):
    """Training rows that share the value of a column, and the sum and mean of their scores."""

    group: bool | Label | None = Field(description="The value; null: rows of which it is not known.")
    group_name: str | None
    rows: int
    sum: float
    mean: float


class GroupInfluence(_Answer):
    """The groups of one query, the largest sum first."""

    query: Asked
    groups: list[Group]


class GroupsAnswer(_Answer):
    """`results` are in the order of the queries, or one result for their mean."""

    index: IndexInfo
    method: str
    convention: str
    by: str
    results: list[GroupInfluence]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line a group; `query` is the position in `results`."""
        return _display.frame(
            [{"query": at, **group.model_dump()} for at, result in enumerate(self.results) for group in result.groups]
        )

    def _repr_html_(self) -> str:
        return _display.groups_html(self)


class PairsAnswer(_Answer):
    """`scores[i][j]`: that of training example j, first those of `train_examples`, on query i."""

    index: IndexInfo
    method: str
    convention: str
    queries: list[Asked]
    train: list[Asked]
    scores: list[list[float]]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line a query, one column a training example, by their positions in the request."""
        return _display.frame([{str(at): score for at, score in enumerate(scores)} for scores in self.scores])

    def _repr_html_(self) -> str:
        return _display.pairs_html(self)
