"""The steps that complete an unfinished generation: the curvature of each checkpoint, the rows of each stretch at each
checkpoint, and the check of those that are new.

Each depends on what pending.json says and on the steps that it names, never on the order in which other steps were
done: however many workers share them, and wherever a build was resumed, the files have the same bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from gradtrace.basis import Basis
from gradtrace.errors import MismatchError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.coordinates import load_coordinates
from gradtrace.sparse.store import index_rows
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.sparse.whitening import weight_curvature_at, whitening_factors
from gradtrace.store.manifest import Manifest, ShardEntry
from gradtrace.store.precision import load_column_scales
from gradtrace.store.row_ids import Ids, read_row_ids
from gradtrace.store.shards import ShardLayout
from gradtrace_indexer.build.bad_rows import BadRows, usable_ids, with_skipped_deleted
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.build.curvature import checkpoint_curvature
from gradtrace_indexer.build.fit import write_curvature
from gradtrace_indexer.build.row_check import check_new_rows, is_new, zero_rows_message
from gradtrace_indexer.build.row_kinds import DenseRows
from gradtrace_indexer.build.rows import RowWorkers, write_rows
from gradtrace_indexer.generations import publish, save_pending
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.work.board import Board, Step, StepRecord, remove_steps
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.segment_file import SegmentWriter
from gradtrace_indexer.writing.shard_writer import (
    ShardTask,
    ShardWriter,
    missing_shards,
    representation_writer,
    shard_name,
    with_shards,
)

OnUnits = Callable[[int], object]


def complete(builder: Builder, pending: Manifest) -> Manifest:
    """Compute what an unfinished generation lacks, committing each part, and publish. Returns the published manifest.

    Raises:
        StoreError: the disk is full; what was written is used when run again.
        TaskError: a row's loss or gradient is not finite, or a row cannot be read.
        CheckpointError, MismatchError: weights that are needed are missing, or were changed since the beginning.
    """
    directory, board = builder.directory, builder.board(pending.generation)
    try:
        with board.coordinated(builder.plan):
            finished = with_skipped_deleted(directory, _completed(builder, pending, board))
        message = zero_rows_message(index_rows(directory, finished), finished)
        if message is not None:
            warnings.warn(message, stacklevel=2)
        published = publish(directory, finished)
        remove_steps(directory)
        return published
    except MismatchError as error:
        raise MismatchError(f"{error}; or give up what is unfinished, with `gradtrace discard`") from error


def _completed(builder: Builder, pending: Manifest, board: Board) -> Manifest:
    completion, manifest = Completion(builder, pending, board), pending

    def commit(step: Step) -> None:
        nonlocal manifest
        extended = completion.with_steps(manifest, [step])
        if extended != manifest:
            manifest = save_pending(builder.directory, extended)

    steps = [*completion.steps(), *completion.recorded_steps()]
    board.announce(steps)
    with progress_bar("index", sum(step.units for step in steps), " rows", builder.progress) as bar:
        if board.shared:  # each step has its record: a manifest for each, of all before it, would be much to write
            board.work_off(steps, bar)
            manifest = completion.with_steps(pending, steps)
        else:
            board.work_off(steps, bar, commit)
    return completion.with_skipped(manifest)


class _RowsAt(NamedTuple):
    """What computes rows at a checkpoint, the last that a worker needed."""

    checkpoint: int
    kind: DenseRows | StrongestOfEach
    workers: RowWorkers[Any]


class Completion:
    """pending: the unfinished generation as pending.json had it, with all or some of its rows"""

    def __init__(self, builder: Builder, pending: Manifest, board: Board) -> None:
        self._builder, self._directory, self._pending, self._board = builder, builder.directory, pending, board
        self._missing = missing_shards(pending)
        begun: dict[str, object] = {
            "shards": [],
            "curvature": [],
            "checksum": "",
        }  # what is added while it is completed
        board.turn_to(pending.model_copy(update=begun).content())
        self._bases = builder.bases_of(pending)
        self._rows_at: _RowsAt | None = None

    def steps(self) -> list[Step]:
        """All that any worker can do, each after those that it needs."""
        entries = enumerate(self._pending.checkpoints)
        return [step for number, entry in entries if entry.kind != "recorded" for step in self._steps_at(number)]

    def _steps_at(self, number: int) -> Iterator[Step]:
        """Sparse rows are chosen by the curvature, that of a basis is taken from the rows."""
        pending, name = self._pending, self._pending.checkpoints[number].name
        lacks_curvature = pending.basis.has_curvature and len(pending.curvature) <= number
        before = {_curvature(number)} if pending.basis.is_sparse and lacks_curvature else set[str]()
        curvature = Step(_curvature(number), f"curvature at {name}", partial(self._curvature, number), number)
        if before:
            yield curvature
        missing = [task for task in self._missing if task.checkpoint == number]
        for task in missing:
            rows, title = task.stop - task.start, f"rows at {name}"
            yield Step(_rows(task), title, partial(self._rows, task), number, rows, before)
        written = before | {_rows(task) for task in missing}
        if missing or any(is_new(shard, pending) for shard in pending.shards if shard.checkpoint == number):
            yield Step(f"check-{number:03d}", f"check at {name}", partial(self._check, number), number, 0, written)
        if lacks_curvature and not before:
            yield curvature._replace(needs=written)

    def recorded_steps(self) -> list[Step]:
        """Those that only a worker with the recording can do: its rows, and the columns of the trained model."""
        steps = []
        for task in self._missing:
            if self._pending.checkpoints[task.checkpoint].kind == "recorded":
                trained = task._replace(checkpoint=self._pending.last_checkpoint)
                needs = {_rows(trained)} if trained in self._missing else set[str]()
                compute = partial(self._recorded_rows, task, trained)
                steps.append(Step(_rows(task), "recorded rows", compute, None, task.stop - task.start, needs))
        return steps

    def with_skipped(self, manifest: Manifest) -> Manifest:
        """The manifest, which has all shards, with the rows that turned out to be bad while these were written.

        Not before: what a step does must not depend on which others came first.
        """
        return manifest.with_skipped(self._skipped(manifest.shards))

    def _skipped(self, shards: Iterable[ShardEntry]) -> dict[int, str]:
        names = (_rows(ShardTask(shard.checkpoint, shard.start, shard.stop)) for shard in shards)
        records = [record for name in names if (record := self._board.record(name)) is not None]
        return {row: reason for record in reversed(records) for row, reason in record.skipped.items()}

    def with_steps(self, manifest: Manifest, steps: Iterable[Step]) -> Manifest:
        """The manifest with what steps wrote, and the curvature of all checkpoints up to the first that lacks it."""
        records = [self._board.record(step.name) for step in steps]
        shards = [record.shard for record in records if record is not None and record.shard is not None]
        curvature = list(manifest.curvature)
        while (known := self._board.record(_curvature(len(curvature)))) is not None and known.file is not None:
            curvature.append(known.file)
        return with_shards(manifest, shards).model_copy(update={"curvature": curvature})

    def _at(self, number: int) -> Manifest:
        """The generation as if it had this checkpoint alone, with what is known there so far."""
        pending = self._pending
        shards = [shard for shard in pending.shards if shard.checkpoint == number]
        records = [self._board.record(_rows(task)) for task in self._missing if task.checkpoint == number]
        shards += [record.shard for record in records if record is not None and record.shard is not None]
        skipped = self._skipped(shards)
        known = self._board.record(_curvature(number))
        curvature = pending.curvature[number : number + 1] if known is None or known.file is None else [known.file]
        changes = {
            "checkpoints": [pending.checkpoints[number]],
            "shards": sorted((s.model_copy(update={"checkpoint": 0}) for s in shards), key=lambda shard: shard.start),
            "curvature": curvature,
        }
        return pending.with_skipped(skipped).model_copy(update=changes)

    def _model(self, number: int) -> GradientModel:
        return self._builder.indexed_model(self._pending.checkpoints[number])

    def _basis(self, number: int) -> Basis | None:
        """That of the rows at a checkpoint; None where rows are sparse."""
        return self._bases[self._pending.checkpoints[number].run] if self._bases else None

    def _curvature(self, number: int, on_units: OnUnits) -> StepRecord:
        at = self._at(number)
        tensors = checkpoint_curvature(
            self._directory, at, self._basis(number), self._usable(at), partial(self._model, number)
        )
        name = f"{self._pending.checkpoints[number].name}.{self._pending.generation}"
        return StepRecord(file=write_curvature(self._directory, name, tensors))

    def _usable(self, at: Manifest) -> Ids:
        return usable_ids(read_row_ids(self._directory, at).live_ids(), at)

    def _check(self, number: int, on_units: OnUnits) -> StepRecord:
        kind = self._computing_rows_at(number).kind
        check_new_rows(self._directory, self._at(number), number, kind, self._model(number))
        return StepRecord()

    def _computing_rows_at(self, number: int) -> _RowsAt:
        if self._rows_at is None or self._rows_at.checkpoint != number:
            self._rows_at = None  # its models need not be in memory beside the next ones
            kind: Any = self._row_kind(number)
            workers = self._builder.workers(self._model(number), kind, represent=number in self._pending.represented)
            self._rows_at = _RowsAt(number, kind, workers)
        return self._rows_at

    def _row_kind(self, number: int) -> DenseRows | StrongestOfEach:
        if (basis := self._basis(number)) is not None:
            return DenseRows(basis)
        at = self._at(number)
        curvature = weight_curvature_at(self._directory, at, 0, load_coordinates(self._directory, at))
        assert at.basis.damping is not None  # rows are sparse
        whitening = whitening_factors(curvature.eigenvalues, curvature.means, at.basis.damping)
        return StrongestOfEach(whitening.to(self._builder.device), at.basis.dimensions)

    def _rows(self, task: ShardTask, on_units: OnUnits) -> StepRecord:
        """The rows of one stretch at one checkpoint, in batches counted from its start."""
        builder, pending = self._builder, self._pending
        workers = self._computing_rows_at(task.checkpoint).workers
        bad = BadRows(pending.skipped, builder.skip_bad_rows)
        ids = read_row_ids(self._directory, pending).ids[task.start : task.stop]
        with ExitStack() as writers:
            writer = (
                SegmentWriter(self._directory, _rows_name(pending, task))
                if pending.basis.is_sparse
                else writers.enter_context(self._row_writer(task))
            )
            represented = representation_writer(self._directory, pending, task.checkpoint, task.start, len(ids))
            if represented is not None:
                writers.enter_context(represented)
            columns = write_rows(
                builder.reader, workers, ids.tolist(), builder.batch_size, writer, on_units, bad, represented
            )
            rows, segment = writer.commit() if isinstance(writer, SegmentWriter) else (writer.commit(), None)
            representations = None if represented is None else represented.commit()
        name = f"columns/{shard_name(pending, task.checkpoint, task.start)}.parquet"
        file = write_file(self._directory, name, columns.parquet())
        shard = ShardEntry(**task._asdict(), rows=rows, representations=representations, columns=file, segment=segment)
        return StepRecord(shard=shard, skipped=bad.new)

    def _row_writer(self, task: ShardTask) -> ShardWriter:
        pending = self._pending
        layout = ShardLayout(task.stop - task.start, tuple(pending.levels), pending.precision)
        scales = load_column_scales(self._directory, pending)  # by training run
        run_scales = scales[pending.checkpoints[task.checkpoint].run] if scales else None
        return ShardWriter(self._directory, _rows_name(pending, task), layout, run_scales)

    def _recorded_rows(self, task: ShardTask, trained: ShardTask, on_units: OnUnits) -> StepRecord:
        recording, batch_size = self._builder.recording, self._builder.batch_size
        assert recording is not None  # only a build with the recording resumes one
        with self._row_writer(task) as writer:
            for start in range(task.start, task.stop, batch_size):
                rows = recording.hydra_rows[start : min(start + batch_size, task.stop)]
                writer.append(torch.from_numpy(rows.copy()))
                on_units(len(rows))
            entry = writer.commit()
        known = self._board.record(_rows(trained))
        shards = self._pending.shards if known is None or known.shard is None else [known.shard]
        columns = next(shard.columns for shard in shards if (shard.checkpoint, shard.start) == trained[:2])
        return StepRecord(shard=ShardEntry(**task._asdict(), rows=entry, columns=columns))


def _rows(task: ShardTask) -> str:
    return f"rows-{task.checkpoint:03d}-{task.start:09d}"


def _curvature(number: int) -> str:
    return f"curvature-{number:03d}"


def _rows_name(manifest: Manifest, task: ShardTask) -> str:
    return f"rows/{shard_name(manifest, task.checkpoint, task.start)}.rows"
