"""The wire schemas of answers about a service: its state, its indexes, the jobs that change them, and its refusals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gradtrace_client._display import frame, table_html
from gradtrace_client.schemas import AnswerSchema, Split

if TYPE_CHECKING:
    import pandas

VERSION_HEADER = "Gradtrace-Version"  # a header of every answer; client and service must have the same major version
MAX_PROBLEMS = 10  # that one document names
LONGEST_PATH = 200  # characters
LONGEST_DETAIL = 1_000
_LONGEST_KEY = 80

JobOperation = Literal["update", "roll back", "delete", "retrain"]


class Status(AnswerSchema):
    status: Literal["ok", "ready"]


class IndexSummary(AnswerSchema):
    """One index of a service. `generation`, `task` and `rows` are null if its manifest cannot be read."""

    name: str | None = Field(description="Its name in requests; null: it is the only index and needs none.")
    generation: int | None
    task: str | None
    rows: int | None
    deleted: int | None = Field(None, description="As in `GET /index`.")
    loaded: bool | None = Field(description="Whether a worker has it in memory.")
    opening_seconds: float | None = Field(
        None, description="For how long a worker has been opening it, or its new generation; null: none does."
    )


class Indexes(AnswerSchema):
    """The first is the default."""

    indexes: list[IndexSummary]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each index."""
        return frame([index.model_dump() for index in self.indexes])

    def _repr_html_(self) -> str:
        records = [index.model_dump().values() for index in self.indexes]
        lines = [["" if value is None else escape(str(value)) for value in record] for record in records]
        return table_html("Indexes", list(IndexSummary.model_fields), lines)


class Generation(AnswerSchema):
    """One state of an index. Every change makes another, and earlier ones are kept until they are pruned."""

    generation: int
    created: datetime | None = Field(
        description="When it was published, as the times of the index's files tell; null: they do not."
    )
    rows: int | None = Field(description="Training rows that answers may name; null: its manifest is damaged.")
    checkpoints: int | None = Field(description="Number of its checkpoints; null: its manifest is damaged.")
    current: bool = Field(description="Whether it is the one that is published.")
    reason: str | None = Field(
        None, description="What made it: `build`, `append rows`, `delete rows`, `roll back` ...; null: not known."
    )
    problem: str | None = Field(None, description="Why it cannot be rolled back to, if that is known.")


class Generations(AnswerSchema):
    """The current one first, then the earlier ones that are kept, the latest first."""

    generations: list[Generation]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each generation."""
        return frame([generation.model_dump() for generation in self.generations])

    def _repr_html_(self) -> str:
        records = [generation.model_dump().values() for generation in self.generations]
        lines = [["" if value is None else escape(str(value)) for value in record] for record in records]
        return table_html("Generations", list(Generation.model_fields), lines)


class RetrainingPrediction(AnswerSchema):
    """What a method predicted of a retraining, on each query and in the mean over the queries."""

    method: str
    score_sums: list[float] = Field(description="Of the scores of the rows left out, on each query.")
    predicted_changes: list[float] | None = Field(
        description="Of what is measured, on each query; null: the method predicts nothing in that unit."
    )
    predicted_change: float | None = Field(description="Their mean.")
    spearman: float | None = Field(
        description="Rank correlation over the queries of `score_sums` and measured changes; null: one is constant."
    )


class Retraining(AnswerSchema):
    """Two trainings with one seed, with all rows of an index and without some, beside what was predicted."""

    rows: int = Field(description="Training rows of the first training: all that are in the index.")
    removed: int = Field(description="How many of them the second one lacked.")
    seed: int
    split: Split = Field(description="The data set of the queries.")
    queries: list[int] = Field(description="Rows of that data set.")
    measurement: str = Field(description="What was measured on the queries: `loss` or the task's `measurement`.")
    before: list[float] = Field(description="Measured on each query after the training with all rows.")
    after: list[float] = Field(description="The same without the rows.")
    measured: tuple[float, float] = Field(description="Means of `before` and of `after`.")
    measured_change: float = Field(description="Above zero: the model is worse without the rows.")
    accuracy: tuple[float, float] | None = Field(
        description="Share of queries that are predicted correctly, before and after; null: labels are no classes."
    )
    method: str | None = Field(description="Whose `predicted_change` it is: the first that predicts in this unit.")
    predicted_change: float | None
    predictions: list[RetrainingPrediction]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each query, with the predicted change of each method that predicts."""
        columns: dict[str, Sequence[float]] = {"row": self.queries, "before": self.before, "after": self.after}
        predicted = {of.method: of.predicted_changes for of in self.predictions if of.predicted_changes is not None}
        columns |= {f"predicted:{method}": changes for method, changes in predicted.items()}
        return frame([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])

    def text(self) -> str:
        """What came out, in words."""
        predicted = "" if self.predicted_change is None else f", predicted {self.predicted_change:+.3g} ({self.method})"
        words = f"{self.measurement} {self.measured[0]:.4g} to {self.measured[1]:.4g} without {self.removed:,} rows"
        return f"{words}: {self.measured_change:+.3g}{predicted}"


class Job(AnswerSchema):
    """Work on an index that takes longer than a request, done by a separate process."""

    id: str
    index: str
    operation: JobOperation
    roll_back_to: int | None = None
    rows: int | None = Field(None, description="How many rows are deleted, or left out: as many as were named.")
    query_rows: list[int] | None = Field(None, description="Of `retrain`, as it was asked for; so `seed`, `method`.")
    seed: int | None = None
    method: str | None = None
    who: str | None = Field(None, description="Name of the key that started it.")
    state: Literal["running", "succeeded", "failed", "interrupted"] = Field(
        description="`interrupted`: the service ended while it ran, and did not resume it."
    )
    progress: float = Field(description="Share of the rows computed, or of the trainings done, from 0 to 1.")
    generation: int = Field(description="The index's, when the job started or, once it has ended, when it ended.")
    attempts: int = Field(default=1, description="How often its process was started: a killed job is resumed.")
    interruptions: int = Field(default=0, description="How often the service ended while it ran, and resumed it.")
    error: str | None = Field(default=None, description="Why it failed, with the remedy.")
    lost_methods: dict[str, str] = Field(
        default_factory=dict,
        description="Methods that the index offered before the job and no longer offers, each with the remedy.",
    )
    result: Retraining | None = Field(None, description="Of `retrain`, once it has succeeded.")
    created: datetime
    ended: datetime | None = None

    def _repr_html_(self) -> str:
        words = f"{self.operation} of {self.index}, {self.state}, generation {self.generation}"
        words += "" if self.error is None else f": {self.error}"
        words += "" if self.result is None else f": {self.result.text()}"
        words += "".join(f"; no {method} any more: {remedy}" for method, remedy in self.lost_methods.items())
        return f'<p><progress value="{self.progress:.3f}" max="1"></progress> {escape(words)}</p>'


class Jobs(AnswerSchema):
    """The latest first."""

    jobs: list[Job]

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each job."""
        return frame([job.model_dump() for job in self.jobs])

    def _repr_html_(self) -> str:
        return "".join(job._repr_html_() for job in self.jobs)


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


def field_problems(errors: Sequence[Mapping[str, Any]]) -> list[FieldProblem]:
    """The first of pydantic's validation errors as field problems; each names the field and what it accepts. The last
    one says how many others there are."""
    named = [FieldProblem(field=_field_path(error["loc"]), detail=_remedy(error)) for error in errors[:MAX_PROBLEMS]]
    if len(errors) > MAX_PROBLEMS:
        named.append(FieldProblem(field="", detail=f"{len(errors) - MAX_PROBLEMS:,} more problems are not named"))
    return named


def shortened(text: str, most: int) -> str:
    """At most so many characters: the beginning, the end, and how many are left out between them."""
    if len(text) <= most:
        return text
    gap = f"... ({len(text):,} characters) ..."
    head = max(0, most - len(gap)) * 2 // 3
    tail = max(0, most - len(gap) - head)
    return text[:head] + gap + text[len(text) - tail :]


def _field_path(location: Iterable[str | int]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{shortened(part, _LONGEST_KEY)}" for part in location)
    return shortened(path.removeprefix("."), LONGEST_PATH)


def _remedy(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field: leave it out"
    return shortened(str(error["msg"]).removeprefix("Value error, "), LONGEST_DETAIL)
