"""What is done of an unfinished generation, and who does what: the folder `unfinished/GENERATION` of an index.

Each step that a worker has done leaves a record there, which names its files; each that one does now has a claim. In
the end the coordinator, the only writer of the index, makes the manifest of the records. The folder goes with that.

A build that is not shared has no claims, and the coordinator writes what it has done straight to pending.json.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from gradtrace.errors import CorruptIndexError
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, FileEntry, ShardEntry, shard_files
from gradtrace_indexer.work.claims import Claims, Holder
from gradtrace_indexer.writing.files import write_file

UNFINISHED = "unfinished"
COORDINATOR = "coordinator"  # the claim of the process that begins and publishes the generation
_PLAN, _STEPS = "plan", "steps"
_JSON, _DONE = ".json", ".done"  # suffixes of files; the latter of the records of steps
_POLL_SECONDS = 0.2

M = TypeVar("M", bound=BaseModel)


class StepRecord(BaseModel):
    """What a step wrote.

    work: digest of the work that it was a step of; filled in when it is kept
    skipped: rows that turned out to be bad, with the reason
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    work: str = ""
    shard: ShardEntry | None = None
    file: FileEntry | None = None
    skipped: dict[int, str] = {}


class Plan(BaseModel):
    """How the coordinator reads and differentiates rows, so that all workers write the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int
    skip_bad_rows: bool


class ListedStep(BaseModel):
    """A step as it is listed for those who look on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    units: int


class StepList(BaseModel):
    """The steps that the coordinator waits for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: list[ListedStep]


class StepState(NamedTuple):
    """holder: who does it now, if anybody does"""

    step: ListedStep
    is_done: bool
    holder: Holder | None

    @property
    def units_done(self) -> int:
        return self.step.units if self.is_done else self.holder.units if self.holder else 0


class Step(NamedTuple):
    """A part of the work that is done as a whole, with the same result whoever does it.

    title: what a progress bar says meanwhile
    compute: does it; is given what to tell of units that are done
    checkpoint: position of the one whose model it needs; None: no model
    units: its share of the progress
    needs: names of the steps that come before it
    """

    name: str
    title: str
    compute: Callable[[Callable[[int], object]], StepRecord]
    checkpoint: int | None = None
    units: int = 0
    needs: Collection[str] = ()


def remove_steps(directory: Path) -> None:
    """Once a generation is published: other workers see by it that nothing is left to do."""
    shutil.rmtree(directory / UNFINISHED, ignore_errors=True)


def unfinished_generations(directory: Path) -> list[int]:
    """The numbers of those whose steps are known, ascending."""
    if (directory / MANIFEST_NAME).exists() and not (directory / PENDING_NAME).exists():
        return []  # what a process left that was killed after publishing
    return sorted(int(folder.name) for folder in (directory / UNFINISHED).glob("*") if folder.name.isdecimal())


class Board:
    """
    shared: whether other workers may take steps
    rank, world: this worker's number among how many, which begin at different steps
    """

    def __init__(
        self, directory: Path, generation: int, *, shared: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.directory, self.generation, self.shared = directory, generation, shared
        self.rank, self.world = rank, world
        self.folder = f"{UNFINISHED}/{generation}"
        self.claims = Claims(directory / self.folder)
        self.work = ""  # digest of the work whose steps these are
        self._records: dict[str, StepRecord] = {}
        self._told: dict[str, int] = {}  # units of steps in work that the bar was told of

    def turn_to(self, work: bytes) -> None:
        """From now on, records are those of steps of this work; others count as not there. A worker that did not see
        that a build was given up may leave some in the folder of the next.

        work: all that its steps depend on
        """
        self.work = xxhash.xxh3_128_hexdigest(work)
        self._records.clear()

    def record(self, step: str) -> StepRecord | None:
        """What a step left; None: it is not done.

        Raises:
            CorruptIndexError: its record is damaged.
        """
        if step not in self._records:
            found = self.read(step, StepRecord, _DONE)
            if found is not None and found.work == self.work:
                self._records[step] = found
        return self._records.get(step)

    def read(self, name: str, schema: type[M], suffix: str = _JSON) -> M | None:
        """One of the folder's files; None where there is none. Raises CorruptIndexError where it is damaged."""
        path = self.directory / self.folder / f"{name}{suffix}"
        try:
            return schema.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CorruptIndexError(
                f"{path} is damaged ({error.error_count()} problems): give up what is unfinished, with "
                "`gradtrace discard`, and begin again"
            ) from None

    def write(self, name: str, content: BaseModel, suffix: str = _JSON) -> None:
        """Raises StoreError where the disk is full."""
        write_file(self.directory, f"{self.folder}/{name}{suffix}", content.model_dump_json().encode())

    def plan(self) -> Plan | None:
        """None as long as the work cannot be shared."""
        return self.read(_PLAN, Plan)

    @contextmanager
    def coordinated(self, plan: Plan) -> Iterator[None]:
        """Let other workers take steps meanwhile, if the work is shared."""
        if not self.shared:
            yield
            return
        with self.claims.claimed(COORDINATOR, seized=True):  # whoever had it: this process is the only writer now
            self.write(_PLAN, plan)
            yield

    @property
    def is_coordinated(self) -> bool:
        """Whether a living coordinator lets other workers take steps."""
        return self.plan() is not None and not self.claims.is_abandoned(COORDINATOR)

    def announce(self, steps: Sequence[Step]) -> None:
        """List the steps for those who look on, where the work is shared."""
        if self.shared:
            listed = [ListedStep(name=step.name, title=step.title, units=step.units) for step in steps]
            self.write(_STEPS, StepList(steps=listed))

    def states(self) -> list[StepState]:
        """How far the announced steps are; none where none are announced."""
        listed, holders = self.read(_STEPS, StepList), self.claims.holders()
        done = self._names_done()
        return [
            StepState(step, step.name in done, holders.get(step.name))
            for step in (listed.steps if listed is not None else [])
        ]

    def file_names(self) -> set[str]:
        """Of the files in the folder, and those that its records name."""
        paths = list((self.directory / self.folder).glob("*"))
        records = [self.read(path.stem, StepRecord, _DONE) for path in paths if path.suffix == _DONE]
        files = [record.file for record in records if record is not None and record.file is not None]
        files += [file for record in records if record and record.shard for file in shard_files(record.shard)]
        return {f"{self.folder}/{path.name}" for path in paths} | {file.path for file in files}

    def drop(self, name: str) -> None:
        """Remove one of the folder's files, if it is there."""
        (self.directory / self.folder / f"{name}{_JSON}").unlink(missing_ok=True)

    def work_off(
        self,
        steps: Sequence[Step],
        bar: tqdm[Any],
        on_done: Callable[[Step], object] = lambda step: None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Do steps, as far as no other worker does, until all are done.

        steps: each after those that it needs
        bar: shows the progress of all workers
        on_done: told of each step once it is done, by whomever
        until: whether to stop before

        Raises what a step raises.
        """
        lacking, last = {step.name: step for step in steps}, None
        while lacking and not until():
            for name in lacking.keys() & self._names_done():
                if self.record(name) is not None:
                    on_done(step := lacking.pop(name))
                    bar.update(step.units - self._told.pop(name, 0))
            ready = [step for step in lacking.values() if lacking.keys().isdisjoint(step.needs)]
            for step in sorted(self._from_own_part(ready), key=lambda step: step.checkpoint != last):
                if self._attempt(step, bar):
                    last = step.checkpoint
                    break
            else:
                if lacking:
                    time.sleep(_POLL_SECONDS)

    def _names_done(self) -> set[str]:
        folder = self.directory / self.folder
        return self._records.keys() | {path.stem for path in folder.glob(f"*{_DONE}")}

    def _from_own_part(self, steps: list[Step]) -> list[Step]:
        first = len(steps) * self.rank // self.world
        return steps[first:] + steps[:first]

    def _attempt(self, step: Step, bar: tqdm[Any]) -> bool:
        """Do a step, unless another worker does."""
        if not self.shared:
            self._records[step.name] = record = self._computed(step, bar, lambda units: None)
            if record.skipped:  # which pending.json has no place for
                self.write(step.name, record, _DONE)
            return True
        with self.claims.claimed(step.name) as claim:
            if claim is not None and self.record(step.name) is None:  # another may have done it just before
                record = self._computed(step, bar, claim.advance)
                self.write(step.name, record, _DONE)
                self._records[step.name] = record
        return claim is not None

    def _computed(self, step: Step, bar: tqdm[Any], on_units: Callable[[int], object]) -> StepRecord:
        def tell(units: int) -> None:
            self._told[step.name] = self._told.get(step.name, 0) + units
            bar.update(units)
            on_units(units)

        bar.set_description_str(step.title, refresh=False)
        return step.compute(tell).model_copy(update={"work": self.work})
