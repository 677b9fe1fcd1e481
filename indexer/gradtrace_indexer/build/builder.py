"""What builds and updates share: computing what a generation in the making still lacks.

That is a list of independent, idempotent tasks: the curvature of a checkpoint, and the rows of one stretch at one
checkpoint. Each is committed before the next begins, so that what was killed goes on with the first that is missing,
to the same bytes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gradtrace.basis import Basis, load_bases
from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.indexed import indexed_checkpoint
from gradtrace.checkpoints.second_moments import SecondMoments
from gradtrace.data.dataset import fetch
from gradtrace.data.sample import varied_rows
from gradtrace.devices import pick_device
from gradtrace.errors import CheckpointError, MismatchError, StoreError
from gradtrace.fingerprint import check_probe_losses, check_task
from gradtrace.models.examination import Examination
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.path_report import summary, warn_of_slow_paths
from gradtrace.recording import Recording
from gradtrace.store.manifest import CheckpointEntry, Manifest, OptimizerEntry, ShardEntry
from gradtrace.store.precision import load_column_scales
from gradtrace.store.row_ids import Ids, read_row_ids
from gradtrace.store.rows import RowStore
from gradtrace.store.shards import ShardLayout, representation_layout
from gradtrace.task import Example, Task
from gradtrace_indexer.build.bad_rows import BadRows, usable_ids, with_skipped_deleted
from gradtrace_indexer.build.fit import FitSpec, RunFit, Samples, fit_run, write_curvature
from gradtrace_indexer.build.recorded import recorded_basis
from gradtrace_indexer.build.row_check import check_written_rows
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.build.rows import RowWorkers, write_rows
from gradtrace_indexer.build.zero_rows import zero_rows_message
from gradtrace_indexer.generations import publish, save_pending
from gradtrace_indexer.searchers.build import check_searcher
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.shard_writer import ShardWriter

_MOST_WORKERS = 8  # copies of the model


class ShardTask(NamedTuple):
    """Stored rows [start, stop) at one checkpoint."""

    checkpoint: int
    start: int
    stop: int


def missing_shards(manifest: Manifest) -> list[ShardTask]:
    """The shards that an unfinished generation lacks, in the order in which they are written.

    Stretches are those of the first checkpoint; rows that it does not have yet are cut into new ones.
    """
    stretches = manifest.stretches()
    first = stretches[-1][1] if stretches else 0
    stretches += [
        (start, min(start + manifest.shard_rows, manifest.rows))
        for start in range(first, manifest.rows, manifest.shard_rows)
    ]
    done = {(shard.checkpoint, shard.start) for shard in manifest.shards}
    wanted = (ShardTask(number, *stretch) for number in range(len(manifest.checkpoints)) for stretch in stretches)
    return [task for task in wanted if (task.checkpoint, task.start) not in done]


def shard_name(manifest: Manifest, checkpoint: int, start: int) -> str:
    """Of a new shard's files, without folder and ending: no other generation's shard has it."""
    return f"{manifest.checkpoints[checkpoint].name}/{start:09d}.{manifest.generation}"


def representation_writer(
    directory: Path, manifest: Manifest, checkpoint: int, start: int, rows: int
) -> ShardWriter | None:
    """Of the representations that belong to a new shard; None where rows have none at its checkpoint."""
    if manifest.representations is None or checkpoint not in manifest.represented:
        return None
    layout = representation_layout(rows, manifest.representations.dimensions)
    return ShardWriter(directory, f"representations/{shard_name(manifest, checkpoint, start)}.rows", layout)


def with_shard(manifest: Manifest, shard: ShardEntry) -> Manifest:
    shards = sorted([*manifest.shards, shard], key=lambda entry: (entry.checkpoint, entry.start))
    return manifest.model_copy(update={"shards": shards})


def entry_name(checkpoint: Checkpoint, run: int) -> str:
    """What an index calls a checkpoint: runs mostly give theirs the same file names."""
    return f"run-{run}/{checkpoint.name}" if run else checkpoint.name


def checkpoint_entries(
    directory: Path, checkpoints: Sequence[Checkpoint], task: Task, run: int = 0
) -> list[CheckpointEntry]:
    return [
        CheckpointEntry(
            name=entry_name(checkpoint, run),
            file=os.path.relpath(checkpoint.path.parent.resolve(), directory.resolve()) + f"/{checkpoint.name}",
            step=checkpoint.step,
            learning_rate=checkpoint.learning_rate,
            learning_rate_sum=checkpoint.learning_rate_sum,
            sha256=checkpoint.sha256(),
            moments_sha256=checkpoint.moments_sha256(),
            optimizer=None if checkpoint.optimizer is None else OptimizerEntry(**asdict(checkpoint.optimizer)),
            batch_size=checkpoint.batch_size,
            run=run,
            kind=checkpoint.kind,
            second_moments=second_moments(checkpoint, task) is not None,
        )
        for checkpoint in checkpoints
    ]


def second_moments(checkpoint: Checkpoint, task: Task) -> SecondMoments | None:
    """Those kept with a checkpoint; None, with a warning, where it is not certain whose they are."""
    if checkpoint.optimizer is not None and checkpoint.optimizer.name == "sgd":
        return None
    try:
        return checkpoint.second_moments(task.model())
    except CheckpointError as error:
        warnings.warn(f"{error}. The index is built without them", stacklevel=2)
        return None


class Builder:
    """Brings an index's unfinished generation to its end."""

    def __init__(
        self,
        task: Task,
        directory: Path,
        device: str,
        batch_size: int,
        progress: bool,
        recording: Recording | None = None,
        num_workers: int = 0,
        skip_bad_rows: bool = False,
    ) -> None:
        """
        Args:
            recording: where the rows of a recorded column block come from.
            num_workers: processes that read the training data ahead; 0: this one reads it.
            skip_bad_rows: mark rows that cannot be indexed, instead of stopping.

        Raises:
            StoreError: batch_size < 1 or num_workers < 0.
        """
        if batch_size < 1:
            raise StoreError(f"batch_size must be at least 1, not {batch_size}")
        self.recording = recording
        self.task, self.directory, self.device = task, directory, torch.device(pick_device(device))
        self.batch_size, self.progress = batch_size, progress
        self.reader, self.skip_bad_rows = RowReader(task.train, num_workers), skip_bad_rows
        self._probe_rows: list[int] = []
        self._probe: list[Example] = []
        self._examination: Examination | None = None
        self._told = False  # how layers are differentiated

    def model(self, checkpoint: Checkpoint) -> GradientModel:
        """The first one is examined; what is found is right for the task's other checkpoints."""
        if not self._probe:
            self.probe_on(np.arange(len(self.task.train)))
        model = GradientModel(
            self.task,
            checkpoint,
            self.device,
            self._probe,
            rows=self._probe_rows,
            examination=self._examination,
            largest=self.batch_size,
        )
        if self._examination is None:
            self._examination = model.examination
            warn_of_slow_paths(model, self._probe)
            if self.progress and not self._told:
                self._told = True
                tqdm.write(summary(model), file=sys.stderr)
        return model

    def probe_on(self, rows: Ids) -> None:
        """Try models on some of these rows."""
        self._probe_rows = varied_rows(self.task, among=rows)
        self._probe, self._examination = fetch(self.task.train, self._probe_rows), None

    def bases_of(self, manifest: Manifest) -> list[Basis]:
        """One for each training run."""
        return [basis.to(self.device) for basis in load_bases(self.directory, manifest)]

    def fit(self, checkpoints: Sequence[Checkpoint], name: str, spec: FitSpec, samples: Samples) -> RunFit:
        """Fit a training run's basis at these checkpoints, the last one its reference. Raises as `fit_run`."""

        def models() -> Iterator[GradientModel]:
            return map(self.model, tqdm(checkpoints, "fit", disable=not self.progress, leave=False))

        reference = self.model(checkpoints[-1])
        given = None if self.recording is None else recorded_basis(self.recording, reference, len(self.task.train))
        return fit_run(self.directory, name, spec, reference, models, samples, given)

    def check(self, manifest: Manifest, grown: bool = False) -> GradientModel:
        """See that the task is the index's, with or without new rows at its end, and that what is to come could be
        opened. Returns the last checkpoint's model.

        Raises:
            MismatchError: names what differs.
            CheckpointError: the weights of a checkpoint are missing.
            StoreError: the library of the index's searcher is missing.
        """
        check_task(self.task, manifest.task, grown)
        self.probe_on(self._usable(manifest))
        found = [indexed_checkpoint(self.directory, entry) for entry in manifest.checkpoints]
        if manifest.searcher is not None:
            check_searcher(manifest.searcher.name)
        model = self.model(found[manifest.last_checkpoint])
        check_probe_losses(self.task, model, manifest.task)
        return model

    def finish(self, pending: Manifest) -> Manifest:
        """Compute what is missing, committing each part, and publish. Returns the published manifest.

        Raises:
            StoreError: the disk is full; what is there is used when run again.
            TaskError: a row's loss or gradient is not finite, or a row cannot be read.
            CheckpointError, MismatchError: weights that are needed are missing, or were changed since the beginning.
        """
        bases = self.bases_of(pending)
        try:
            written = self._with_rows(self._with_curvature(pending, bases), bases)
            complete = with_skipped_deleted(self.directory, written)
            check_written_rows(self.directory, complete, bases, lambda number: self._model_of(complete, number))
            message = zero_rows_message(RowStore(self.directory, complete), complete)
            if message is not None:
                warnings.warn(message, stacklevel=2)
            return publish(self.directory, complete)
        except MismatchError as error:
            raise MismatchError(f"{error}; or give up what is unfinished, with `gradtrace discard`") from error

    def _model_of(self, manifest: Manifest, number: int) -> GradientModel:
        return self.model(indexed_checkpoint(self.directory, manifest.checkpoints[number]))

    def _with_curvature(self, manifest: Manifest, bases: Sequence[Basis]) -> Manifest:
        spec = manifest.basis
        missing = manifest.checkpoints[len(manifest.curvature) :] if spec.kind == "spectral" else []
        if not missing:
            return manifest
        samples = Samples(self.task, spec.seed, spec.fitted_rows, self._usable(manifest))
        for entry in tqdm(missing, "curvature", disable=not self.progress, leave=False):
            name = f"{entry.name}.{manifest.generation}"
            checkpoint = indexed_checkpoint(self.directory, entry)
            moments = second_moments(checkpoint, self.task) if entry.second_moments else None
            model = self.model(checkpoint)
            file = write_curvature(self.directory, name, bases[entry.run], model, samples, moments)
            manifest = save_pending(
                self.directory, manifest.model_copy(update={"curvature": [*manifest.curvature, file]})
            )
        return manifest

    def _with_rows(self, manifest: Manifest, bases: Sequence[Basis]) -> Manifest:
        tasks = missing_shards(manifest)
        total = sum(task.stop - task.start for task in tasks)
        with tqdm(total=total, unit=" rows", desc="index", disable=not self.progress) as bar:
            for number, of_checkpoint in groupby(tasks, key=lambda task: task.checkpoint):
                entry = manifest.checkpoints[number]
                represents = number in manifest.represented
                workers = self._workers(entry, bases[entry.run], represents) if entry.kind != "recorded" else None
                for task in of_checkpoint:
                    bad = BadRows(manifest.skipped, self.skip_bad_rows)
                    shard = (
                        self._write_shard(manifest, workers, task, bar, bad)
                        if workers
                        else self._copy_recorded(manifest, task, bar)
                    )
                    manifest = save_pending(self.directory, with_shard(manifest.with_skipped(bad.found), shard))
        return manifest

    def _usable(self, manifest: Manifest) -> Ids:
        return usable_ids(read_row_ids(self.directory, manifest).live_ids(), manifest)

    def _workers(self, entry: CheckpointEntry, basis: Basis, represent: bool) -> RowWorkers:
        count = min(_MOST_WORKERS, torch.get_num_threads()) if self.device.type == "cpu" else 1
        checkpoint = indexed_checkpoint(self.directory, entry)
        return RowWorkers([self.model(checkpoint) for _ in range(count)], basis, represent)

    def _write_shard(
        self, manifest: Manifest, workers: RowWorkers, task: ShardTask, bar: tqdm[Any], bad: BadRows
    ) -> ShardEntry:
        """The rows of one stretch at one checkpoint, in batches counted from its start."""
        ids = read_row_ids(self.directory, manifest).of(np.arange(task.start, task.stop))
        layout = ShardLayout(len(ids), tuple(manifest.levels), manifest.precision)
        name = shard_name(manifest, task.checkpoint, task.start)
        column_scales = load_column_scales(self.directory, manifest)  # by training run
        own = column_scales[manifest.checkpoints[task.checkpoint].run] if column_scales else None
        with ExitStack() as writers:
            writer = writers.enter_context(ShardWriter(self.directory, f"rows/{name}.rows", layout, own))
            second = representation_writer(self.directory, manifest, task.checkpoint, task.start, len(ids))
            if second is not None:
                writers.enter_context(second)
            columns = write_rows(self.reader, workers, ids.tolist(), self.batch_size, writer, bar.update, bad, second)
            entry, represented = writer.commit(), None if second is None else second.commit()
        return ShardEntry(
            **task._asdict(),
            rows=entry,
            representations=represented,
            columns=write_file(self.directory, f"columns/{name}.parquet", columns.parquet()),
        )

    def _copy_recorded(self, manifest: Manifest, task: ShardTask, bar: tqdm[Any]) -> ShardEntry:
        """The recorded rows of one stretch, with the columns of the trained model."""
        assert self.recording is not None  # a build without it is not the one that began
        layout = ShardLayout(task.stop - task.start, tuple(manifest.levels), manifest.precision)
        name = f"rows/{shard_name(manifest, task.checkpoint, task.start)}.rows"
        scales = load_column_scales(self.directory, manifest)
        with ShardWriter(self.directory, name, layout, scales[0] if scales else None) as writer:
            for start in range(task.start, task.stop, self.batch_size):
                rows = self.recording.hydra_rows[start : min(start + self.batch_size, task.stop)]
                writer.append(torch.from_numpy(rows.copy()))
                bar.update(len(rows))
            entry = writer.commit()
        trained = (manifest.last_checkpoint, task.start)
        columns = next(shard.columns for shard in manifest.shards if (shard.checkpoint, shard.start) == trained)
        return ShardEntry(**task._asdict(), rows=entry, columns=columns)
