"""The wire schemas of answers about leaving rows out of the training."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pydantic import Field

from gradtrace_client._display import frame, note_html, table_html
from gradtrace_client.group_and_pair_schemas import Asked
from gradtrace_client.schemas import AnswerSchema, ScoresAnswer, Timing

if TYPE_CHECKING:
    import pandas


class RemovalTerms(AnswerSchema):
    """What rows do together to a query, or in the mean to several."""

    loss: float = Field(description="The query's, at the last checkpoint.")
    score_sum: float = Field(description="Of the rows; above zero they are proponents together.")
    predicted_change: float | None = Field(
        description="How much what is explained would rise if the rows were left out of the training, in its own unit; "
        "null: the method predicts nothing in that unit."
    )


class RemovalEffect(RemovalTerms):
    query: Asked
    target: str = Field(description="The quantity explained, such as `loss` or `loss at the predicted label`.")


class RemovalAnswer(ScoresAnswer):
    """`results` are in the order of the queries; `mean` is the mean of each of their numbers."""

    rows: int = Field(description="Different rows that are left out.")
    results: list[RemovalEffect]
    mean: RemovalTerms
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each query."""
        return frame(
            [
                {"split": result.query.split, "row": result.query.row, "label": result.query.label}
                | result.model_dump(exclude={"query"})
                for result in self.results
            ]
        )

    def _repr_html_(self) -> str:
        heads = ("query", "explained", "loss", "predicted change", "sum of scores")
        lines = [[escape(result.query.text()), escape(result.target), *_cells(result)] for result in self.results]
        title = f"Without {self.rows:,} training rows"
        return table_html(title, heads, [*lines, ["mean", "", *_cells(self.mean)]]) + note_html(self.convention)


def mean_of(results: list[RemovalEffect]) -> RemovalTerms:
    """The means of the queries' numbers; no predicted change where a query has none."""
    changes = [result.predicted_change for result in results]
    known = [change for change in changes if change is not None]
    return RemovalTerms(
        loss=sum(result.loss for result in results) / len(results),
        score_sum=sum(result.score_sum for result in results) / len(results),
        predicted_change=sum(known) / len(known) if len(known) == len(results) else None,
    )


def _cells(terms: RemovalTerms) -> list[str]:
    change = "" if terms.predicted_change is None else f"{terms.predicted_change:+.4g}"
    return [f"{terms.loss:.4g}", change, f"{terms.score_sum:+.4g}"]
