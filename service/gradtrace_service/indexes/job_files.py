"""What a job and its process tell each other, in the directory of their index. Its state is in the state file.

INDEX/jobs/{id}.rows                    while it runs: the numbers of the rows that it is about, one a line
INDEX/jobs/{id}.result.json             until the state has it: what `gradtrace retrain` writes
INDEX/jobs/{id}.result.json.trainings/  while it runs: the trainings that are done
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from gradtrace.store.regular_files import regular_path
from gradtrace_client.service_schemas import Retraining
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.format_files import remove_file

_FOLDER = "jobs"
_RESULT = "result.json"
_TRAININGS = f"{_RESULT}.trainings"


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


def remove_request(directory: Path, job: str) -> None:
    """Remove what only a running job needs. Raises StoreError where a file cannot be removed."""
    for ending in ("rows", _RESULT):
        remove_file(directory, _name(job, ending))
    trainings = directory / _name(job, _TRAININGS)
    if trainings.is_dir() and not trainings.is_symlink():
        for path in list(trainings.iterdir()):
            remove_file(directory, f"{_name(job, _TRAININGS)}/{path.name}")
        with contextlib.suppress(OSError):  # somebody else's folder is in it
            trainings.rmdir()


def _name(job: str, ending: str) -> str:
    """Of a job's file, in the index directory."""
    return f"{_FOLDER}/{job}.{ending}"
