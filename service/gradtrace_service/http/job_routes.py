"""Jobs that change indexes or retrain their models, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.sse import EventSourceResponse

from gradtrace_client.job_requests import DeleteRowsRequest, ReindexRequest, RetrainRequest
from gradtrace_client.service_schemas import Job, Jobs
from gradtrace_service.answers.retraining import check_retraining
from gradtrace_service.engine.work import Work
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.keeping import key_name
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.streams import one_stream
from gradtrace_service.http.timed_engine import Workers
from gradtrace_service.indexes.jobs import JobRunner

router = APIRouter(route_class=JsonRoute)


def _jobs(request: Request) -> JobRunner:
    return cast(JobRunner, request.app.state.jobs)


OfflineJobs = Annotated[JobRunner, Depends(_jobs)]


async def _caller(request: Request) -> str | None:
    return key_name(request)


Caller = Annotated[str | None, Depends(_caller)]


def _job(job: Annotated[str, Path(max_length=64)], jobs: OfflineJobs) -> Job:
    return jobs.get(job)


KnownJob = Annotated[Job, Depends(_job)]


@router.post("/reindex", status_code=202, responses=error_responses(400, 408, 409, 413, 422, 500, 503))
async def reindex(request: ReindexRequest, jobs: OfflineJobs, who: Caller, response: Response) -> Job:
    """Start a job that brings an index up to date, or rolls it back; one that is at this already is answered instead.

    Queries are answered all the while, and by the new generation from about a second after the job has ended.
    """
    job = await jobs.start(request.index, request.roll_back_to, who)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.post("/rows/delete", status_code=202, responses=error_responses(400, 408, 409, 413, 422, 500, 503))
async def delete_rows(request: DeleteRowsRequest, jobs: OfflineJobs, who: Caller, response: Response) -> Job:
    """Start a job that deletes training rows from an index: its next generation's answers name them no more.

    The other rows keep their numbers; the data set must keep its length. Rolling back brings the rows back.
    """
    job = await jobs.delete_rows(request.index, request.rows, who)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.post("/retrain", status_code=202, responses=error_responses(400, 408, 409, 413, 422, 429, 500, 503, 504))
async def retrain(request: RetrainRequest, engine: Workers, jobs: OfflineJobs, who: Caller, response: Response) -> Job:
    """Start a job that trains with all rows of an index and without some, and compares the change with predictions.

    Only where the task defines `fit`. The job's `result` has the comparison. The index stays as it is, and other jobs
    run beside it; a service retrains one model at a time.
    """
    await engine.run(Work(request.index, check_retraining, request))
    job = await jobs.retrain(request, who)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.get("/jobs", responses=error_responses(500))
async def list_jobs(jobs: OfflineJobs) -> Jobs:
    """Jobs, running and ended, without their results."""
    return Jobs(jobs=[job.model_copy(update={"result": None}) for job in jobs.all()])


@router.get("/jobs/{job}", responses=error_responses(404, 422, 500))
async def get_job(job: KnownJob) -> Job:
    """How far a job is, or how it ended."""
    return job


@router.get(
    "/jobs/{job}/events",
    response_class=EventSourceResponse,
    responses=error_responses(404, 422, 429, 500, 503),
    dependencies=[Depends(one_stream)],
)
async def job_events(job: KnownJob, jobs: OfflineJobs) -> AsyncIterator[Job]:
    """The job, now and whenever it changes, as server-sent events; the last one is of its end."""
    async for state in jobs.follow(job.id):
        yield state
