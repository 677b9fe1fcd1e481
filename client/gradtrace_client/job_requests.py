"""The wire schemas of requests that start jobs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from gradtrace_client.request_schemas import MAX_QUERIES, RequestSchema, Row, Rows, whole


class ReindexRequest(RequestSchema):
    """Bring an index up to date, with appended rows and new checkpoints, or back to an earlier generation."""

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    roll_back_to: Annotated[int, Field(strict=True, ge=1, lt=2**53), BeforeValidator(whole)] | None = Field(
        None, description="An earlier generation that is still kept."
    )


class DeleteRowsRequest(RequestSchema):
    """Training rows that no answer shall name any more. They may include deleted ones."""

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    rows: Rows = Field(min_length=1, description="Numbers of the rows.")


class RetrainRequest(RequestSchema):
    """Train a new model with all rows of an index and another one without some of them, to see what they do."""

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    without_rows: Rows = Field(min_length=1, description="The training rows that are left out, together.")
    query_rows: list[Row] | None = Field(
        None,
        min_length=1,
        max_length=MAX_QUERIES,
        description="Rows of the query data set on which both models are measured (of the training data set, where the "
        "task has no other). Default: at most 128 chosen at random, the same ones every time.",
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32), BeforeValidator(whole)] = Field(
        0, description="Of both trainings."
    )
    method: str | None = Field(
        None, max_length=64, description="The method that is compared. Default: all of the index that forecast."
    )
