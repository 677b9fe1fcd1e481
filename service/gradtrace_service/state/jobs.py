"""Jobs: what was asked for, by whom, how far each is or how it ended.

They belong to the directory of their index, not to its name: a job that was interrupted is resumed, and of two services
that share a file each may have an index `index`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from gradtrace_client.service_schemas import Job


def keep(connection: sqlite3.Connection, directory: str, job: Job) -> None:
    """directory: of the job's index, absolute"""
    connection.execute(
        "INSERT INTO jobs (id, directory, job) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET job = excluded.job",
        (job.id, directory, job.model_dump_json()),
    )


def kept(connection: sqlite3.Connection, directories: Sequence[str]) -> list[tuple[str, Job]]:
    """Each with its directory, in the order of their starts: clocks may be set back."""
    query = "SELECT directory, job FROM jobs WHERE directory IN (SELECT value FROM json_each(?)) ORDER BY number"
    records = connection.execute(query, (json.dumps(directories),))
    return [(directory, Job.model_validate_json(text)) for directory, text in records]


def forget(connection: sqlite3.Connection, job: str) -> None:
    connection.execute("DELETE FROM jobs WHERE id = ?", (job,))
