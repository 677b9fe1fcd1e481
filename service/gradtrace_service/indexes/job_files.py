"""The files of jobs, in the directory of their index.

INDEX/jobs/{id}.json                    the job's state, and its result
INDEX/jobs/{id}.rows                    while it runs: the numbers of the rows that it is about, one a line
INDEX/jobs/{id}.result.json             until the state has it: what `gradtrace retrain` writes
INDEX/jobs/{id}.result.json.trainings/  while it runs: the trainings that are done
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from gradtrace.errors import CorruptIndexError, GradtraceError
from gradtrace.store.regular_files import regular_path
from gradtrace_client.service_schemas import Job, Retraining
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.format_files import remove_file
from gradtrace_service.indexes.hosted import Hosted

_FOLDER = "jobs"
_RESULT = "result.json"
_TRAININGS = f"{_RESULT}.trainings"
_ID = "[0-9a-f]{16}"  # of jobs: what else lies in their folder is left alone

_log = logging.getLogger(__name__)


def write_state(directory: Path, job: Job) -> None:
    try:
        write_file(directory, _name(job.id), job.model_dump_json(indent=1).encode())
    except GradtraceError as error:  # the job itself goes on
        _log.error("the state of job %s could not be kept: %s", job.id, error)


def write_rows(directory: Path, job: str, rows: Sequence[int]) -> None:
    """Raises StoreError where the disk is full or the directory cannot be written."""
    write_file(directory, _name(job, "rows"), "".join(f"{row}\n" for row in rows).encode())


def rows_path(directory: Path, job: str) -> Path:
    return directory / _name(job, "rows")


def result_path(directory: Path, job: str) -> Path:
    return directory / _name(job, _RESULT)


def has_result(directory: Path, job: str) -> bool:
    return result_path(directory, job).is_file()


def read_result(directory: Path, job: str) -> Retraining:
    return Retraining.model_validate_json(regular_path(directory, _name(job, _RESULT)).read_bytes())


def share_trained(directory: Path, job: str) -> float:
    """Of the two trainings of a retraining."""
    return len(list((directory / _name(job, _TRAININGS)).glob("*.json"))) / 2


def remove_job(directory: Path, job: str) -> None:
    """Forget a job that has ended. Raises StoreError where a file cannot be removed."""
    remove_request(directory, job)
    remove_file(directory, _name(job))


def remove_request(directory: Path, job: str) -> None:
    """Remove what only a running job needs. Raises as `remove_job`."""
    for ending in ("rows", _RESULT):
        remove_file(directory, _name(job, ending))
    trainings = directory / _name(job, _TRAININGS)
    if trainings.is_dir() and not trainings.is_symlink():
        for path in list(trainings.iterdir()):
            remove_file(directory, f"{_name(job, _TRAININGS)}/{path.name}")
        with contextlib.suppress(OSError):  # somebody else's folder is in it
            trainings.rmdir()


def kept_jobs(hosted: Hosted) -> Iterator[Job]:
    """The jobs kept in an index, whatever its name was then. All that have ended have an end time."""
    for path in (hosted.path / _FOLDER).glob("*.json"):
        if not re.fullmatch(_ID, path.stem):
            continue
        # A file that a full disk cut short, one of another user, or no regular one.
        with contextlib.suppress(ValidationError, OSError, CorruptIndexError):
            regular_path(hosted.path, _name(path.stem))
            job = Job.model_validate_json(path.read_bytes())
            written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
            ended = written if job.ended is None and job.state != "running" else job.ended
            yield job.model_copy(update={"id": path.stem, "index": hosted.name, "ended": ended})


def _name(job: str, ending: str = "json") -> str:
    """Of a job's file, in the index directory."""
    return f"{_FOLDER}/{job}.{ending}"
