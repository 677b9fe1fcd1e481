"""Jobs that change an index or retrain its model: each runs a command of the command line in a process of its own.

The commands resume, so a job whose process was killed is started again, and so are the jobs that a killed service left
behind, when the service is started the next time: their states are in the state file. Files are read and written on
threads: a slow disk must not keep the event loop from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from gradtrace.errors import GradtraceError, StoreError
from gradtrace.store.manifest import PENDING_NAME, Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client.job_requests import RetrainRequest
from gradtrace_client.service_schemas import Job
from gradtrace_indexer.generations import kept_generations, lost_methods, read_pending
from gradtrace_indexer.work.board import UNFINISHED
from gradtrace_indexer.work.watching import unfinished_steps
from gradtrace_indexer.writing.shard_writer import missing_shards
from gradtrace_service.engine.engine import DrainingError
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.errors import FieldError, NoSuchJobError, OtherJobError, StateError
from gradtrace_service.indexes.hosted import Hosted, file_stamp, known_name
from gradtrace_service.indexes.job_commands import command, killed, last_complaint, signal_of, yield_to_answers
from gradtrace_service.indexes.job_files import (
    has_result,
    read_result,
    remove_request,
    share_trained,
    write_rows,
)
from gradtrace_service.state import jobs as job_states
from gradtrace_service.state.database import Database

_ATTEMPTS = 5
_KEPT_JOBS = 100  # of an index, that have ended; older ones are forgotten
_LOCKED_SECONDS = 2.0  # between two attempts while another process writes the index
_KILL_SECONDS = 10.0  # that a process has to end after SIGTERM
_POLL_SECONDS = 0.2  # between two readings of a job's progress

_log = logging.getLogger(__name__)


class JobRunner:
    """Starts jobs and follows them. All methods are for the event loop's thread.

    workers: processes that share the work of a job that updates an index
    """

    def __init__(self, hosted: Sequence[Hosted], database: Database, workers: int = 1) -> None:
        self._workers = workers
        self._hosted: Mapping[str, Hosted] = {index.name: index for index in hosted}
        self._database = database
        self._jobs: dict[str, Job] = {}  # in the order of their starts
        self._running: dict[str | None, asyncio.Task[None]] = {}  # by lane
        self._changed = asyncio.Condition()
        self._starting = asyncio.Lock()
        self._remover = ThreadPoolExecutor(1, "gradtrace-jobs")
        self._draining = False

    async def resume(self) -> None:
        """Take up the jobs of the state file, and restart those that were running when the service ended: of each lane
        the latest; of the others, the end could not be written down."""
        self._jobs = {job.id: job for job in await self._kept()}
        for job in reversed(list(self._jobs.values())):
            if job.state == "running" and _lane(job.operation, job.index) in self._running:
                unknown = {"state": "interrupted", "error": "how it ended is unknown", "ended": _now()}
                await self._keep(job.model_copy(update=unknown))
            elif job.state == "running":
                await self._start(job.model_copy(update={"interruptions": job.interruptions + 1}))
        for index in self._hosted:
            await self._forget_old(index)

    async def _kept(self) -> list[Job]:
        """By the names that their indexes have now. None, and a line in the log, where the state file is not read."""
        names = {_directory(index): index.name for index in self._hosted.values()}
        try:
            jobs = await self._database.read(partial(job_states.kept, directories=list(names)))
        except StateError as error:
            _log.error("earlier jobs are not known: %s", error)
            return []
        return [job.model_copy(update={"index": names[directory]}) for directory, job in jobs]

    async def start(self, index: str | None, roll_back_to: int | None = None, who: str | None = None) -> Job:
        """Start to bring an index up to date, or to roll it back. If that is running already, its job is returned.

        index: its name; None: the first
        who: the name of the caller's key

        Raises:
            DrainingError: the service is shutting down.
            FieldError: no index has this name.
            IndexUnavailableError: the index was deleted, or its manifest is damaged.
            OtherJobError: another job is running on it.
        """
        asked = {"operation": "update" if roll_back_to is None else "roll back", "roll_back_to": roll_back_to}
        asked |= {"who": who}
        return await self._begin(index, "index" if roll_back_to is None else "roll_back_to", asked)

    async def delete_rows(self, index: str | None, rows: Sequence[int], who: str | None = None) -> Job:
        """Start to delete rows of an index. Raises as `start`; FieldError also for a row that the index never had."""
        return await self._begin(index, "rows", {"operation": "delete", "rows": len(rows), "who": who}, rows)

    async def retrain(self, request: RetrainRequest, who: str | None = None) -> Job:
        """Start to train without some rows, for comparison. It writes no index, and other jobs run beside it. Raises as
        `start`; OtherJobError while another index's model is retrained, too."""
        asked = {"operation": "retrain", "rows": len(request.without_rows), "who": who}
        asked |= request.model_dump(include={"query_rows", "seed", "method"})
        return await self._begin(request.index, "without_rows", asked, request.without_rows)

    async def _begin(self, index: str | None, field: str, asked: Mapping[str, Any], rows: Sequence[int] = ()) -> Job:
        """field: of the request, that a conflict names;  asked: fields of the job;  rows: those that it is about"""
        if self._draining:
            raise DrainingError
        index = known_name(self._hosted, index)
        lane = _lane(asked["operation"], index)
        async with self._starting:
            if lane not in self._running:
                manifest = await asyncio.to_thread(self._manifest, index)
                _check_rows(field, rows, manifest)
                return await self._new_job(index, manifest.generation, asked, rows)
            running = self._running_in(lane)
            if rows or any(getattr(running, name) != value for name, value in asked.items() if name != "who"):
                raise OtherJobError(field, running.id, f"{running.operation} of {running.index}")
            return running

    def _running_in(self, lane: str | None) -> Job:
        running = (job for job in self._jobs.values() if job.state == "running")
        return next(job for job in running if _lane(job.operation, job.index) == lane)

    async def _new_job(self, index: str, generation: int, asked: Mapping[str, Any], rows: Sequence[int]) -> Job:
        job = Job(
            id=secrets.token_hex(8),
            index=index,
            state="running",
            progress=0.0,
            generation=generation,
            created=_now(),
            **asked,
        )
        try:
            if rows:
                await asyncio.to_thread(write_rows, self._hosted[index].path, job.id, rows)
        except StoreError as error:
            job = job.model_copy(update={"state": "failed", "error": str(error), "ended": job.created})
            await self._keep(job)
        else:
            await self._start(job)
        return job

    def _manifest(self, index: str) -> Manifest:
        try:
            return read_manifest(self._hosted[index].path)
        except StoreError as error:
            raise IndexUnavailableError(str(error)) from error

    def get(self, job: str) -> Job:
        """Raises NoSuchJobError."""
        if job not in self._jobs:
            raise NoSuchJobError(job)
        return self._jobs[job]

    def all(self) -> list[Job]:
        """The latest first."""
        return list(reversed(self._jobs.values()))

    async def follow(self, job: str) -> AsyncIterator[Job]:
        """The job's state now and after every change, until the job or the service ends. Raises NoSuchJobError."""
        state = self.get(job)
        yield state
        while state.state == "running" and not self._draining:
            if (changed := await self._after(state)) is not state:
                yield (state := changed)

    async def _after(self, state: Job) -> Job:
        async with self._changed:
            await self._changed.wait_for(lambda: self.get(state.id) is not state or self._draining)
        return self.get(state.id)

    async def drain(self) -> None:
        """Start no more jobs, and end every `follow`."""
        self._draining = True
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """End the processes; their jobs are resumed when the service is started again."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.to_thread(self._remover.shutdown)

    async def _start(self, job: Job) -> None:
        await self._keep(job)
        self._running[_lane(job.operation, job.index)] = asyncio.ensure_future(self._run(job))

    async def _run(self, job: Job) -> None:
        try:
            ending = await self._ending(job)
        finally:
            del self._running[_lane(job.operation, job.index)]
        await self._change(job.id, ended=_now(), **ending)
        self._remover.submit(remove_request, self._hosted[job.index].path, job.id)
        await self._forget_old(job.index)

    async def _ending(self, job: Job) -> dict[str, object]:
        """Run the job to its end, and say how it ended."""
        try:
            code, error = await self._attempts(job)
            return await asyncio.to_thread(self._outcome, job, code, error)
        except (GradtraceError, OSError) as failure:  # OSError: no process could be started
            return {"state": "failed", "error": str(failure)}
        except Exception as failure:  # a defect; the job has ended all the same
            _log.error("job %s failed", job.id, exc_info=failure)
            return {"state": "failed", "error": f"{type(failure).__name__}; the service's log says why"}

    def _outcome(self, job: Job, code: int, error: str) -> dict[str, object]:
        path = self._hosted[job.index].path
        generation = read_manifest(path).generation
        if code == 0 and job.operation == "retrain":
            return {"state": "succeeded", "progress": 1.0, "result": read_result(path, job.id)}
        if code == 0:
            lost = _lost_methods(path, job.generation)
            return {"state": "succeeded", "generation": generation, "progress": 1.0, "lost_methods": lost}
        return {"state": "failed", "generation": generation, "error": error}

    async def _attempts(self, job: Job) -> tuple[int, str]:
        """As `_attempt`. A process that a signal ended is started again, up to _ATTEMPTS times. While another process
        writes the index, which a killed service may have left behind, the job waits for it."""
        attempt = 1
        while True:
            if await asyncio.to_thread(has_result, self._hosted[job.index].path, job.id):
                return os.EX_OK, ""  # of a process that a killed service left behind
            code, error = await self._attempt(job, attempt)
            if code == os.EX_TEMPFAIL:
                await asyncio.sleep(_LOCKED_SECONDS)
            elif not signal_of(code):
                return code, error
            elif attempt == _ATTEMPTS:
                return code, f"{killed(code)}, {attempt} times"
            else:
                attempt += 1

    async def _attempt(self, job: Job, attempt: int) -> tuple[int, str]:
        """Run the job's process. Returns its exit code, negative for signals, and its last error message."""
        await self._change(job.id, attempts=attempt)
        process = await asyncio.create_subprocess_exec(
            *command(job, self._hosted[job.index], self._workers),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the service, which ends its jobs itself
        )
        assert process.stderr is not None
        yield_to_answers(process.pid)
        complaints, before = asyncio.ensure_future(process.stderr.read()), None
        try:
            while not complaints.done():
                await asyncio.wait([complaints], timeout=_POLL_SECONDS)
                before = await self._update_progress(job.id, before)
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), _KILL_SECONDS)
                except asyncio.TimeoutError:
                    process.kill()
                    await process.wait()
        complaint = last_complaint(complaints.result().decode(errors="replace"))
        if code:
            cause = killed(code) if signal_of(code) else complaint
            _log.warning("job %s, attempt %d, ended with %d: %s", job.id, attempt, code, cause)
        return code, complaint

    async def _update_progress(self, job: str, before: object) -> object:
        """before: as returned by the last call, None at first"""
        path = self._hosted[self._jobs[job].index].path
        if self._jobs[job].operation == "retrain":
            trained = await asyncio.to_thread(share_trained, path, job)
            if trained > self._jobs[job].progress:
                await self._change(job, progress=trained)
            return None
        stamp = await asyncio.to_thread(_unfinished_stamp, path)
        if stamp != before:  # a manifest is long where there are many shards
            share = await asyncio.to_thread(_share_done, path)
            if share is not None and share != self._jobs[job].progress:
                await self._change(job, progress=share)
        return stamp

    async def _change(self, job: str, **fields: object) -> None:
        await self._keep(self._jobs[job].model_copy(update=fields))
        async with self._changed:
            self._changed.notify_all()

    async def _forget_old(self, index: str) -> None:
        ended = [job for job in self._jobs.values() if job.index == index and job.state != "running"]
        for job in ended[:-_KEPT_JOBS]:
            self._jobs.pop(job.id, None)  # another that ends meanwhile may have forgotten it
            await self._write(partial(job_states.forget, job=job.id))

    async def _keep(self, job: Job) -> None:
        self._jobs[job.id] = job
        await self._write(partial(job_states.keep, directory=_directory(self._hosted[job.index]), job=job))

    async def _write(self, change: Callable[[Connection], None]) -> None:
        """Where the state file fails, the jobs themselves go on."""
        try:
            await self._database.write(change)
        except StateError as error:
            _log.error("the states of jobs could not be kept: %s", error)


def _directory(index: Hosted) -> str:
    return str(index.path.resolve())


def _lane(operation: str, index: str) -> str | None:
    """Jobs of one lane run one at a time: those that write an index, and all that retrain."""
    return None if operation == "retrain" else index


def _check_rows(field: str, rows: Sequence[int], manifest: Manifest) -> None:
    """Raises FieldError for the first row that an index never had."""
    known = manifest.task.train_rows
    if max(rows, default=0) >= known:
        at, row = next((at, row) for at, row in enumerate(rows) if row >= known)
        raise FieldError(f"{field}[{at}]", f"there is no row {row}; rows of this index are 0 to {known - 1}")


def _unfinished_stamp(path: Path) -> object:
    """Another one whenever more of the index's unfinished generation is done."""
    folders = [file_stamp(folder) for folder in (path / UNFINISHED).glob("*")]
    return file_stamp(path / PENDING_NAME), folders


def _share_done(path: Path) -> float | None:
    """The share of its rows that the index's unfinished generation has. None: there is none, or it is being replaced"""
    if steps := unfinished_steps(path):  # of several workers
        return round(sum(step.units_done for step in steps) / max(1, sum(step.step.units for step in steps)), 3)
    with contextlib.suppress(GradtraceError):
        pending = read_pending(path)
        if pending is not None:
            missing = sum(task.stop - task.start for task in missing_shards(pending))
            return round(1 - missing / max(1, pending.rows * len(pending.checkpoints)), 3)
    return None


def _lost_methods(path: Path, generation: int) -> dict[str, str]:
    """Methods that that generation answered and the current one does not, with the remedy for each."""
    before = next((kept for kept in kept_generations(path) if kept.generation == generation), None)
    return {} if before is None else lost_methods(before, read_manifest(path))  # None where it was pruned


def _now() -> datetime:
    return datetime.now(timezone.utc)
