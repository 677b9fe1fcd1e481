"""What changes in the service while somebody looks: marks, saved questions, jobs and generations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from sqlite3 import Connection

import anyio

from gradtrace.errors import GradtraceError
from gradtrace_client.state_schemas import ServiceEvent
from gradtrace_service.errors import StateError
from gradtrace_service.indexes.jobs import JobRunner
from gradtrace_service.indexes.training_rows import RowsOf
from gradtrace_service.state import marks, questions
from gradtrace_service.state.database import Database

_LOOK_SECONDS = 1.0  # between two looks at what other services and jobs change

# By what may change: a value that is another one after each change, and the event that tells it.
_Seen = Mapping[tuple[str, str], tuple[object, ServiceEvent]]

_log = logging.getLogger(__name__)


class Changes:
    """Compares what is there now with what each follower has seen, so a slow one misses states, but no change.

    Everything is for the event loop's thread.

    names: of the indexes; None: the only one, which has no name
    """

    def __init__(
        self, names: Sequence[str | None], rows_of: RowsOf, database: Database | None, jobs: JobRunner | None
    ) -> None:
        self._names, self._rows_of, self._database, self._jobs = names, rows_of, database, jobs
        self._seen: _Seen = {}
        self._followers = 0
        self._looked = asyncio.Condition()
        self._look_now = asyncio.Event()
        self._ending = False

    def look(self) -> None:
        """Something was changed: followers are told at once."""
        self._look_now.set()

    async def run(self) -> None:
        """Look again and again, while there are followers."""
        while True:
            with anyio.move_on_after(_LOOK_SECONDS):
                await self._look_now.wait()
            self._look_now.clear()
            if self._followers:
                try:
                    await self._look()
                except Exception:  # the next look may succeed, and nobody else would look
                    _log.exception("events could not be looked for; they are looked for again")

    async def follow(self) -> AsyncGenerator[ServiceEvent, None]:
        """What changes from now on, until the service ends."""
        self._followers += 1
        try:
            await self._look()
            before = self._seen
            while not self._ending:
                async with self._looked:
                    await self._looked.wait_for(lambda before=before: self._seen is not before or self._ending)  # type: ignore[misc]
                for key, (value, event) in self._seen.items():
                    if key not in before or before[key][0] != value:
                        yield event
                before = self._seen
        finally:
            self._followers -= 1

    async def drain(self) -> None:
        """End every `follow`."""
        self._ending = True
        async with self._looked:
            self._looked.notify_all()

    async def _look(self) -> None:
        seen = {**await self._kept(), **await asyncio.to_thread(self._generations), **self._job_states()}
        if {key: value for key, (value, _) in seen.items()} != {key: value for key, (value, _) in self._seen.items()}:
            self._seen = seen
            async with self._looked:
                self._looked.notify_all()

    async def _kept(self) -> _Seen:
        """What it was, where the state file cannot be read."""
        if self._database is None:
            return {}
        try:
            return await self._database.read(self._revisions)
        except StateError:
            return {key: seen for key, seen in self._seen.items() if key[0] in ("marks", "questions")}

    def _revisions(self, connection: Connection) -> _Seen:
        names = {name or "": name for name in self._names}
        latest = marks.latest_changes(connection)
        changes = {name: latest.get(name, 0) for name in names}
        seen: dict[tuple[str, str], tuple[object, ServiceEvent]] = {
            ("marks", name): (change, ServiceEvent(kind="marks", index=names[name], change=change))
            for name, change in changes.items()
        }
        seen["questions", ""] = questions.revision(connection), ServiceEvent(kind="questions")
        return seen

    def _generations(self) -> _Seen:
        """What it was, where a manifest cannot be read."""
        seen = {}
        for name in self._names:
            key = "generation", name or ""
            try:
                generation = self._rows_of(name).generation
            except GradtraceError:
                seen.update({key: self._seen[key]} if key in self._seen else {})
                continue
            seen[key] = generation, ServiceEvent(kind="generation", index=name, generation=generation)
        return seen

    def _job_states(self) -> _Seen:
        return {
            ("job", job.id): (job, ServiceEvent(kind="job", index=job.index, job=job.id, state=job.state))
            for job in (self._jobs.all() if self._jobs is not None else ())
        }
