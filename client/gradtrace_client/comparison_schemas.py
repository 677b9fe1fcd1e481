"""The wire schemas of the comparison of two questions about the same training rows, request and answer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from gradtrace_client._display import frame, note_html, table_html
from gradtrace_client.group_and_pair_schemas import Asked
from gradtrace_client.request_schemas import RequestSchema, ScoresQuestion, whole
from gradtrace_client.schemas import AnswerSchema, ScoresAnswer, Timing

if TYPE_CHECKING:
    import pandas


MAX_COMPARED_HITS = 500  # at either end: those of two questions are among the 2,000 points of a comparison


class CompareRequest(RequestSchema):
    """Two questions about the same training rows, also of two indexes. Of several queries, their mean counts."""

    first: ScoresQuestion
    second: ScoresQuestion
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_COMPARED_HITS), BeforeValidator(whole)] = Field(
        10, description="Hits at each of the two ends, of which the sides have some in common."
    )


class ComparedSide(ScoresAnswer):
    """What one side asked, and by which index and method."""

    query: Asked
    target: str = Field(description="The quantity explained, in words.")


class Overlap(AnswerSchema):
    """How many of the `k` strongest of either side are among those of the other."""

    proponents: int
    opponents: int


class ComparedPoints(AnswerSchema):
    """Scores by row: the hits at both ends of both sides, and an even sample of the other rows. At most 2,000."""

    row: list[int]
    first: list[float]
    second: list[float]


class ComparisonAnswer(AnswerSchema):
    """Correlations are over all rows that both sides have."""

    first: ComparedSide
    second: ComparedSide
    pearson: float | None = Field(description="Null if either side scores all rows alike.")
    spearman: float | None = Field(description="Of the ranks; null if either side scores all rows alike.")
    k: int
    overlap: Overlap
    points: ComparedPoints
    rows: int = Field(description="Rows that both sides have: deleted ones are left out.")
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each point, with both scores."""
        columns = zip(self.points.row, self.points.first, self.points.second, strict=True)
        return frame([{"row": row, "first": first, "second": second} for row, first, second in columns])

    def _repr_html_(self) -> str:
        sides = [
            [escape(text) for text in (name, side.method, side.query.text(), side.target)]
            for name, side in (("first", self.first), ("second", self.second))
        ]
        table = table_html("Two questions compared", ("", "method", "query", "explained"), sides)
        return table + note_html(self.summary())

    def summary(self) -> str:
        """In one sentence."""
        pearson, spearman = ("unknown" if r is None else f"{r:.3f}" for r in (self.pearson, self.spearman))
        return (
            f"Over {self.rows:,} rows: Pearson correlation {pearson}, Spearman {spearman}; {self.overlap.proponents} "
            f"of {self.k} proponents and {self.overlap.opponents} of {self.k} opponents in common."
        )
