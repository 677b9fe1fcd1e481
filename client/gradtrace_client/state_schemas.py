"""The wire schemas of what people keep in a service: marks of training rows, saved questions; and of its events."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from gradtrace_client._display import frame, table_html
from gradtrace_client.request_schemas import MAX_K, Class, RequestSchema, Row, Rows
from gradtrace_client.schemas import AnswerSchema, Label
from gradtrace_client.service_schemas import Problem

if TYPE_CHECKING:
    import pandas

MAX_MARKED_ROWS = 2_000  # of a request, whose body has 64 KiB
MAX_CONFLICTS = 50  # that a refusal names
LONGEST_NOTE = 1_000  # characters
LONGEST_TITLE = 200
LONGEST_ADDRESS = 4_000

MarkKind = Literal["wrong", "right", "unsure", "remove"]
ExportFormat = Literal["csv", "parquet", "rows"]
ChangeKind = Literal["marks", "questions", "job", "generation"]

Version = Row  # a number of the same range
_RowText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,14})$")]
_IndexName = Annotated[
    str | None, Field(max_length=64, description="Which of the service's indexes. Default: the first.")
]


class UnmarkRequest(RequestSchema):
    """Rows that lose their marks; those without one stay as they are."""

    index: _IndexName = None
    rows: Annotated[Rows, Field(min_length=1, max_length=MAX_MARKED_ROWS)] = Field(
        description="Rows of the training data set."
    )
    expected: Annotated[dict[_RowText, Version], Field(max_length=MAX_MARKED_ROWS)] | None = Field(
        None,
        description='By row: the version of its mark that the caller has seen, 0: none. {"17": 0, "4": 12}. Where '
        "another one is there, nothing is changed, and the answer is 409.",
    )

    @model_validator(mode="after")
    def _expects_of_its_rows(self) -> UnmarkRequest:
        rows = {str(row) for row in self.rows}
        for row in self.expected or ():
            if row not in rows:
                raise ValueError(f"expected: row {row} is not among rows; leave it out")
        return self


class MarkRequest(UnmarkRequest):
    """Rows that all get this mark, in place of one that they may have."""

    mark: MarkKind = Field(description="`wrong`: the label is wrong; `remove`: the row is to be deleted.")
    label: Class | None = Field(None, description="The label that is suggested: a number or a class name.")
    note: Annotated[str, Field(max_length=LONGEST_NOTE)] | None = None


class UndoRequest(RequestSchema):
    index: _IndexName = None
    change: Version = Field(description="As answered to the request that made it.")


class _MarkFilter(RequestSchema):
    index: _IndexName = None
    mark: MarkKind | None = Field(None, description="Only these marks. Default: all.")


class MarksRequest(_MarkFilter):
    """One page of the marks, ordered by row."""

    rows: Annotated[list[Annotated[int, Field(ge=0, lt=2**53)]], Field(min_length=1, max_length=MAX_K)] | None = Field(
        None, description="Only those of these rows."
    )
    offset: Annotated[int, Field(ge=0, lt=2**53)] = Field(0, description="Marks skipped before the first.")
    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(100, description="Marks in the answer.")


class MarksExportRequest(_MarkFilter):
    format: ExportFormat = Field("csv", description="`rows`: text, with the number of a row in each line.")


class SaveQuestionRequest(RequestSchema):
    title: Annotated[str, Field(min_length=1, max_length=LONGEST_TITLE)]
    address: Annotated[str, Field(max_length=LONGEST_ADDRESS, pattern=r"^[#?][^\x00-\x20\x7f]*$")] = Field(
        description="Of the page that shows the answer, from its `?` or `#` on."
    )
    note: Annotated[str, Field(max_length=LONGEST_NOTE)] | None = None


class SavedQuestionsRequest(RequestSchema):
    offset: Annotated[int, Field(ge=0, lt=2**53)] = Field(0, description="Questions skipped before the first.")
    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(100, description="Questions in the answer.")


class Mark(AnswerSchema):
    """What somebody thinks of a training row."""

    row: int
    mark: MarkKind
    label: Label | None = Field(description="The label that is suggested.")
    label_name: str | None
    note: str | None
    who: str | None = Field(description="Name of the API key; null: the service had none.")
    when: datetime
    version: int = Field(description="Of the mark: the number of the change that made it.")


class MarksAnswer(AnswerSchema):
    """One page of the marks, ordered by row."""

    rows_total: int = Field(description="Marks that were asked for, on all pages.")
    counts: dict[str, int] = Field(description="Rows by mark, whatever was asked for.")
    results: list[Mark]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each mark."""
        return frame([mark.model_dump() for mark in self.results])

    def _repr_html_(self) -> str:
        records = [mark.model_dump().values() for mark in self.results]
        lines = [["" if value is None else escape(str(value)) for value in record] for record in records]
        return table_html(f"{self.rows_total} marks", list(Mark.model_fields), lines)


class MarkChange(AnswerSchema):
    """What a request changed."""

    change: int | None = Field(description="Its number, by which it can be undone; null: nothing was changed.")
    results: list[Mark] = Field(description="The marks that are now there.")
    unmarked: list[int] = Field(description="Rows that lost theirs.")


class MarkConflict(AnswerSchema):
    row: int
    mark: Mark | None = Field(description="What is there now; null: none.")


class MarksConflict(Problem):
    """A problem document about marks that others have changed."""

    conflicts: list[MarkConflict] = Field(default_factory=list, description=f"The first {MAX_CONFLICTS}.")
    conflicts_total: int = 0


class SavedQuestion(AnswerSchema):
    id: int
    title: str
    address: str
    note: str | None
    who: str | None = Field(description="Name of the API key; null: the service had none.")
    when: datetime


class SavedQuestions(AnswerSchema):
    """One page of the saved questions, the latest first."""

    total: int
    results: list[SavedQuestion]


class WhoAmI(AnswerSchema):
    """What the service knows of its caller, and what the caller may do."""

    name: str | None = Field(description="Of the API key; null: the service has no keys.")
    scopes: list[str]
    keys_required: bool
    read_only: bool = Field(description="Marks and questions cannot be kept now.")
    started: datetime = Field(description="When the service was started: another time tells that it was restarted.")


class ServiceEvent(AnswerSchema):
    """Something has changed: ask for it again. Several changes may be one event."""

    kind: ChangeKind
    index: str | None = Field(None, description="Whose marks, job or generation; null: the only one, or no index's.")
    change: int | None = Field(None, description="`marks`: the number of the latest change.")
    job: str | None = Field(None, description="`job`: its id.")
    state: str | None = Field(None, description="`job`: its state.")
    generation: int | None = Field(
        None, description="`generation`: that has been published; answers are from it about a second later."
    )
