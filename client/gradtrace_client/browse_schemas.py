"""The wire schemas of answers that show the data sets of an index. The service imports them."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pydantic import Field

from gradtrace_client._display import example_html, frame, label_text, note_html, table_html
from gradtrace_client.schemas import AnswerSchema, ExampleAnswer, Split, Timing

if TYPE_CHECKING:
    import pandas


class ExamplesAnswer(AnswerSchema):
    """One page of the rows that meet all conditions; `rows_total` is the number of all of them.

    `pending`: rows of which something that was asked for is not known yet, such as the predictions on the query data
    set; they meet no condition on it. It is being computed: ask again. `note` says the same in words.
    """

    split: Split
    generation: int
    rows_total: int
    results: list[ExampleAnswer]
    pending: int = 0
    note: str | None = Field(None, description="Why rows may be missing.")
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each row."""
        return frame([example.model_dump(exclude={"example"}) for example in self.results])

    def _repr_html_(self) -> str:
        heads = ("row", "label", "prediction", "loss", "example")
        table = table_html(f"{self.rows_total:,} rows of {self.split}", heads, [_cells(row) for row in self.results])
        return table + ("" if self.note is None else note_html(f"Note: {self.note}"))


def _cells(row: ExampleAnswer) -> list[str]:
    texts = (
        str(row.row),
        label_text(row.label, row.label_name),
        label_text(row.prediction, row.prediction_name),
        "" if row.loss is None else f"{row.loss:.4g}",
    )
    return [*map(escape, texts), example_html(row.example)]
