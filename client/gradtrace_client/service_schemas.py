"""The wire schemas of a service as a whole: its state, its indexes, and the jobs that change them."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gradtrace_client import _display
from gradtrace_client.schemas import WHOLE, _Answer, _Request

if TYPE_CHECKING:
    import pandas

VERSION_HEADER = "Gradtrace-Version"  # of every answer; services and clients of one major version understand each other


class Status(_Answer):
    status: Literal["ok", "ready"]


class IndexSummary(_Answer):
    """One index of a service. `generation`, `task` and `rows` are null where its manifest cannot be read."""

    name: str | None = Field(description="What requests call it; null: it is the only one and needs no name.")
    generation: int | None
    task: str | None
    rows: int | None
    loaded: bool | None = Field(description="Whether it is in memory; null: it is in processes that do not tell.")


class Indexes(_Answer):
    """The first is the default."""

    indexes: list[IndexSummary]

    def to_pandas(self) -> pandas.DataFrame:
        """One line an index."""
        return _display.frame([index.model_dump() for index in self.indexes])

    def _repr_html_(self) -> str:
        return _display.records_html("Indexes", [index.model_dump() for index in self.indexes])


class ReindexRequest(_Request):
    """Bring an index up to date, with appended rows and new checkpoints, or back to an earlier generation."""

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    roll_back_to: Annotated[int, Field(strict=True, ge=1, lt=2**53), WHOLE] | None = Field(
        None, description="An earlier generation that is still kept."
    )


class Job(_Answer):
    """A change of an index that goes on in a process of its own."""

    id: str
    index: str
    operation: Literal["update", "roll back"]
    roll_back_to: int | None = None
    state: Literal["running", "succeeded", "failed"]
    progress: float = Field(description="Share of the rows that are computed, from 0 to 1.")
    generation: int = Field(description="Of the index: when the job began, and once it ended, when it ended.")
    attempts: int = Field(default=1, description="How often its process was started: once killed, it resumes.")
    error: str | None = Field(default=None, description="Why it failed, with the remedy.")
    lost_methods: dict[str, str] = Field(
        default_factory=dict,
        description="Methods by which the index answered before the job and does not now, with what brings each back.",
    )
    created: datetime
    ended: datetime | None = None

    def _repr_html_(self) -> str:
        return _display.job_html(self)


class Jobs(_Answer):
    """The latest first."""

    jobs: list[Job]

    def to_pandas(self) -> pandas.DataFrame:
        """One line a job."""
        return _display.frame([job.model_dump() for job in self.jobs])

    def _repr_html_(self) -> str:
        return "".join(_display.job_html(job) for job in self.jobs)
