"""The wire schemas of answers about groups of rows, and about pairs of training examples and queries."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pydantic import Field

from gradtrace_client._display import frame, label_text, note_html, table_html
from gradtrace_client.schemas import AnswerSchema, Label, ScoresAnswer, Split, Timing

if TYPE_CHECKING:
    import pandas


class Asked(AnswerSchema):
    """An example of the request. `split` and `row` are set if it was given by its row, and is not a mean."""

    split: Split | None
    row: int | None
    label: Label | None
    label_name: str | None
    count: int = Field(
        default=1, description="Number of queries, if it is a mean; the label is then the one that all share."
    )
    target: str | None = Field(
        None, description="The quantity explained, in words, such as `loss`; null: it is a training example."
    )

    def text(self) -> str:
        """What it is, in words."""
        example = "an example" if self.row is None else f"{self.split} row {self.row}"
        example = f"the mean of {self.count} queries" if self.count > 1 else example
        return f"{example}, label {label_text(self.label, self.label_name)}"

    def text_with_target(self) -> str:
        return self.text() if self.target is None else f"{self.text()}, its {self.target}"


class Group(AnswerSchema):
    """Training rows that share a value of a column, or have one in the same range; the sum and mean of their scores."""

    group: bool | Label | str | None = Field(
        description="The value, or the range in words, such as `2 to 15`; null: rows whose value is unknown."
    )
    bounds: tuple[float, float] | None = Field(
        None, description="The smallest and the largest number of a range; null: the rows share one value."
    )
    group_name: str | None
    rows: int
    sum: float
    mean: float


class GroupInfluence(AnswerSchema):
    """The groups of one query, the largest sum first."""

    query: Asked
    groups: list[Group]


class GroupsAnswer(ScoresAnswer):
    """`results` are in the order of the queries, or one result for their mean."""

    by: str
    results: list[GroupInfluence]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each group; `query` is the position in `results`."""
        return frame(
            [
                {"query": query, **group.model_dump()}
                for query, result in enumerate(self.results)
                for group in result.groups
            ]
        )

    def _repr_html_(self) -> str:
        heads = (self.by, "rows", "sum", "mean")
        tables = (
            table_html(f"Influence on {result.query.text_with_target()}", heads, map(_group_cells, result.groups))
            for result in self.results
        )
        return "".join(tables) + note_html(self.convention)


class PairsAnswer(ScoresAnswer):
    """`scores[i][j]`: influence of training example j on query i; `train_examples` come before `train_rows`."""

    queries: list[Asked]
    train: list[Asked]
    scores: list[list[float]]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each query, one column for each training example, by their positions in the answer."""
        return frame([{str(column): score for column, score in enumerate(scores)} for scores in self.scores])

    def _repr_html_(self) -> str:
        heads = ["query", *(example.text() for example in self.train)]
        lines = [
            [escape(query.text_with_target()), *(f"{score:+.4g}" for score in scores)]
            for query, scores in zip(self.queries, self.scores, strict=True)
        ]
        return table_html("Influence of training examples", heads, lines) + note_html(self.convention)


def _group_cells(group: Group) -> list[str]:
    name = str(group.group) if group.group_name is None else group.group_name
    return [escape(name), str(group.rows), f"{group.sum:+.4g}", f"{group.mean:+.4g}"]
