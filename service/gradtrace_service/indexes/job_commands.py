"""The command that does a job, and how its process runs and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from gradtrace_client.service_schemas import Job
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.indexes.job_files import result_path, rows_path

_NICER = 10  # than the service


def command(job: Job, hosted: Hosted, workers: int) -> list[str]:
    """What does the job, by the command line. workers: processes that share the work of an update"""
    program = [sys.executable, "-m", "gradtrace_service"]
    if job.roll_back_to is not None:
        return [*program, "rollback", str(hosted.path), str(job.roll_back_to)]
    if job.operation == "delete":
        return [*program, "delete", str(hosted.path), "--rows-file", str(rows_path(hosted.path, job.id))]
    if job.operation == "retrain":
        return [*program, *_retrain_words(job, hosted)]
    moved = [] if hosted.checkpoints is None else ["--checkpoints", str(hosted.checkpoints[-1])]
    shared = ["--workers", str(workers)] if workers > 1 else []
    return [*program, "update", str(hosted.path), "--task", hosted.task, "--device", hosted.device, *moved, *shared]


def _retrain_words(job: Job, hosted: Hosted) -> list[str]:
    """Of the command line."""
    files = ["--without-rows", str(rows_path(hosted.path, job.id)), "--out", str(result_path(hosted.path, job.id))]
    moved = [word for path in hosted.checkpoints or () for word in ("--checkpoints", str(path))]
    chosen = [] if job.query_rows is None else ["--query-rows", ",".join(map(str, job.query_rows))]
    chosen += [] if job.method is None else ["--method", job.method]
    options = ["--task", hosted.task, "--device", hosted.device, "--seed", str(job.seed or 0)]
    return ["retrain", str(hosted.path), *options, *files, *chosen, *moved]


def yield_to_answers(process: int) -> None:
    """Let it compute with what the service's answers leave of the processors; so do the processes that it starts."""
    niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + _NICER, 19)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process, niceness)


def signal_of(code: int) -> int:
    """The signal that ended a process with this exit code, as Python or a shell tells it; 0: it ended by itself."""
    return -code if code < 0 else max(0, code - 128)


def killed(code: int) -> str:
    """Of a process that a signal ended: why, in words."""
    number = signal_of(code)
    if number == signal.SIGKILL:
        return (
            "its process was killed, perhaps by the system for lack of memory: give the machine or container more "
            "memory and start the job again, it resumes"
        )
    return f"signal {number} ({signal.strsignal(number)}) ended its process"


def last_complaint(stderr: str) -> str:
    """The error that a command ends with, which may have several lines; without one, the last line."""
    lines = stderr.strip().splitlines() or [""]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] :]).removeprefix("error: ") if errors else lines[-1]
