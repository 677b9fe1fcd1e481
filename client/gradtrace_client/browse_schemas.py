"""The wire schemas of answers that show the data sets of an index. The service imports them."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pydantic import Field

from gradtrace_client._display import example_html, frame, label_text, note_html, table_html
from gradtrace_client.schemas import AnswerSchema, ExampleAnswer, IndexInfo, Label, Split, Timing

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


class ColumnsAnswer(AnswerSchema):
    """Values of many rows, each in the order of `rows`; null where unknown."""

    split: Split
    generation: int
    rows: list[int]
    columns: dict[str, list[bool | int | float | str | None]]
    rows_total: int = Field(description="Rows of the data set, without deleted ones.")
    sampled: bool = Field(description="Whether `rows` are some of them, evenly spaced.")
    pending: int = Field(0, description="Rows whose predictions and losses are not known yet: ask again.")

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each row."""
        names, lines = ("row", *self.columns), zip(self.rows, *self.columns.values(), strict=True)
        return frame([dict(zip(names, line, strict=True)) for line in lines])

    def _repr_html_(self) -> str:
        shown = f"{len(self.rows):,} of {self.rows_total:,} rows of {self.split}"
        return note_html(f"{shown}{', evenly spaced' * self.sampled}: {', '.join(self.columns)}")


class LabelSummary(AnswerSchema):
    """The training rows of one class; predictions and losses are those of the last checkpoint."""

    label: Label
    label_name: str | None
    rows: int
    correct: int | None = Field(description="Number of rows that are predicted correctly; null if unknown.")
    mean_loss: float | None


class CheckpointLoss(AnswerSchema):
    """The mean loss of the training rows; null while it is not known yet."""

    name: str
    step: int
    run: int
    mean_loss: float | None


class LossHistogram(AnswerSchema):
    """How many training rows have a loss between two neighbouring edges. Unless losses are negative, the edges begin
    with zero and then grow by a constant factor, since most losses are small."""

    edges: list[float]
    counts: list[int]


class Overview(AnswerSchema):
    """An index at a glance."""

    index: IndexInfo
    labels: list[LabelSummary] = Field(
        description="By class, at most the 1,000 with the most rows; empty where labels are values."
    )
    loss_by_checkpoint: list[CheckpointLoss]
    loss_histogram: LossHistogram | None
    coordinates: list[str] | None = Field(
        description="Names of the features that place a row on a map: the longitude's, the latitude's."
    )
    pending: int = Field(0, description="Checkpoints whose mean loss is not known yet: ask again.")

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each class."""
        return frame([label.model_dump() for label in self.labels])

    def _repr_html_(self) -> str:
        return table_html(f"{self.index.task}, {self.index.rows:,} rows", _LABEL_HEADS, map(_label_cells, self.labels))


_LABEL_HEADS = ("label", "rows", "correct", "mean loss")


def _label_cells(label: LabelSummary) -> list[str]:
    correct = "" if label.correct is None else f"{label.correct:,}"
    loss = "" if label.mean_loss is None else f"{label.mean_loss:.4g}"
    return [escape(label_text(label.label, label.label_name)), f"{label.rows:,}", correct, loss]


def _cells(row: ExampleAnswer) -> list[str]:
    texts = (
        str(row.row),
        label_text(row.label, row.label_name),
        label_text(row.prediction, row.prediction_name),
        "" if row.loss is None else f"{row.loss:.4g}",
    )
    return [*map(escape, texts), example_html(row.example)]
