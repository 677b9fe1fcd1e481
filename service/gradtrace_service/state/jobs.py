"""Jobs: what was asked for, by whom, how far each is or how it ended.

They belong to the directory of their index, not to its name: a job that was interrupted is resumed, and of two services
that share a file each may have an index `index`.
"""

from __future__ import annotations

import sqlite3

from gradtrace_client.service_schemas import Job


def keep(connection: sqlite3.Connection, directory: str, job: Job) -> None:
    """directory: of the job's index, absolute"""
    connection.execute(
        "INSERT INTO jobs (id, directory, job) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET job = excluded.job",
        (job.id, directory, job.model_dump_json()),
    )


def kept(connection: sqlite3.Connection, directory: str) -> list[Job]:
    """In the order of their starts: clocks may be set back."""
    query = "SELECT job FROM jobs WHERE directory = ? ORDER BY number"
    return [Job.model_validate_json(text) for (text,) in connection.execute(query, (directory,))]


def forget(connection: sqlite3.Connection, job: str) -> None:
    connection.execute("DELETE FROM jobs WHERE id = ?", (job,))
