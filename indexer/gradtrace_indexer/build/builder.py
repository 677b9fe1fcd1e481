"""What builds and updates share: computing what an unfinished generation lacks.

That is a list of independent, idempotent tasks: the curvature of a checkpoint, and the rows of one stretch at one
checkpoint. Each is committed before the next begins, so a killed process resumes at the first that is missing, and
writes the same bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from gradtrace.basis import Basis, check_layers, load_bases
from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.indexed import indexed_checkpoint
from gradtrace.data.dataset import fetch
from gradtrace.data.sample import SAMPLE_ROWS, varied_rows
from gradtrace.devices import pick_device
from gradtrace.errors import MismatchError, StoreError
from gradtrace.fingerprint import check_probe_losses, check_task
from gradtrace.fitted.gauss_newton import SecondMoments
from gradtrace.models.examination import Examination
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.path_report import summary, warn_of_slow_paths
from gradtrace.recording import Recording
from gradtrace.sparse.coordinates import load_coordinates
from gradtrace.sparse.store import index_rows
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.sparse.whitening import weight_curvature_at, whitening_factors
from gradtrace.store.manifest import FisherEntry, Manifest, ShardEntry
from gradtrace.store.precision import load_column_scales
from gradtrace.store.row_ids import Ids, read_row_ids
from gradtrace.store.shards import ShardLayout
from gradtrace.task import Example, Task
from gradtrace_indexer.build.bad_rows import BadRows, usable_ids, with_skipped_deleted
from gradtrace_indexer.build.curvature import checkpoint_curvature
from gradtrace_indexer.build.fit import (
    FitSpec,
    RunFit,
    Samples,
    fit_basis,
    fit_coordinates,
    recorded_basis,
    rotated_basis,
    write_basis,
    write_column_scales,
    write_curvature,
)
from gradtrace_indexer.build.row_check import check_new_rows, zero_rows_message
from gradtrace_indexer.build.row_kinds import DenseRows, R, RowKind
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.build.rows import RowWorkers, encoded_batches, write_rows
from gradtrace_indexer.generations import publish, save_pending
from gradtrace_indexer.progress import note, progress_bar
from gradtrace_indexer.searchers import check_searcher
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.segment_file import SegmentWriter
from gradtrace_indexer.writing.shard_writer import (
    ShardTask,
    ShardWriter,
    missing_shards,
    representation_writer,
    shard_name,
    with_shard,
)

_DRAWN_ROWS = 1 << 40  # first of the streams of random numbers that draw rows
_MOST_WORKERS = 8  # copies of the model


class PassOptions(TypedDict, total=False):
    """How training rows are read and differentiated; none of it changes what an index answers.

    batch_size: examples that go through the model together; default 128.
    num_workers: processes that read the training data ahead, as those of PyTorch's DataLoader; 0 (default): none.
    device: "auto" (default), "cpu", "cuda", "cuda:1" ...
    progress: show how far it is; default True.
    """

    batch_size: int
    num_workers: int
    device: str
    progress: bool


class Builder:
    """Brings an index's unfinished generation to its end, and owns the models that this takes.

    One model is kept, the last that was made: large models of many checkpoints need not fit into memory together.
    """

    def __init__(
        self,
        task: Task,
        directory: Path,
        *,
        batch_size: int = 128,
        num_workers: int = 0,
        device: str = "auto",
        progress: bool = True,
        skip_bad_rows: bool = False,
        recording: Recording | None = None,
    ) -> None:
        """
        Args:
            skip_bad_rows: where a row cannot be read, or its loss or gradient is NaN or infinite at a checkpoint, mark
                it as deleted (`manifest.skipped` has the reason) instead of stopping.
            recording: where the rows of a recorded column block come from.
            The others: see `PassOptions`.

        Raises:
            StoreError: batch_size < 1 or num_workers < 0.
        """
        if batch_size < 1:
            raise StoreError(f"batch_size must be at least 1, not {batch_size}")
        self.task, self.directory, self.device = task, directory, torch.device(pick_device(device))
        self.batch_size, self.progress, self.recording = batch_size, progress, recording
        self.reader, self.skip_bad_rows = RowReader(task.train, num_workers), skip_bad_rows
        self._probe_rows: list[int] = []
        self._probe: list[Example] = []
        self._examination: Examination | None = None
        self._model: GradientModel | None = None
        self._summarised = False

    def model(self, checkpoint: Checkpoint) -> GradientModel:
        """The task's model at a checkpoint. The first is examined; the others need no examination of their own."""
        if self._model is not None and self._model.checkpoint.path.resolve() == checkpoint.path.resolve():
            return self._model
        if not self._probe:
            self.probe_on(np.arange(len(self.task.train)))
        self._model = None  # it need not be in memory beside the next one
        self._model = model = GradientModel(
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
            if self.progress and not self._summarised:
                self._summarised = True
                note(summary(model))
        return model

    @property
    def examination(self) -> Examination | None:
        """That of the task, if there was one that an index of all rows may be opened with."""
        of_all_rows = not self.skip_bad_rows and self.batch_size >= SAMPLE_ROWS
        return self._examination if of_all_rows else None

    def probe_on(self, rows: Ids) -> None:
        """Examine models on some of these rows from now on."""
        self._probe_rows = varied_rows(self.task, among=rows)
        self._probe = fetch(self.task.train, self._probe_rows)
        self._examination = self._model = None

    def bases_of(self, manifest: Manifest) -> list[Basis]:
        """One for each training run; none where rows are sparse."""
        if manifest.basis.is_sparse:
            return []
        return [basis.to(self.device) for basis in load_bases(self.directory, manifest)]

    def check_layers(self, manifest: Manifest, run: int, model: GradientModel) -> None:
        """Raises MismatchError unless the layers of a training run's rows are those of the model."""
        if manifest.basis.is_sparse:
            load_coordinates(self.directory, manifest)[run].check(model.plan.layers)
        else:
            check_layers(load_bases(self.directory, manifest)[run], model.plan.layers)

    def fit(
        self,
        checkpoints: Sequence[Checkpoint],
        name: str,
        spec: FitSpec,
        samples: Samples,
        rows: Ids,
        fisher: FisherEntry | None,
    ) -> RunFit:
        """Fit a training run's basis at these checkpoints, the last one its reference, or take the recording's; and,
        for int4, the scales of its columns. Both are written to files of this name.

        rows: those that a Gauss-Newton basis is fitted to;  fisher: the manifest's

        Raises:
            StoreError: as `fit_basis`, or a full disk.
            RecordingError: as `recorded_basis`.
            LossError: a loss or gradient of the samples is NaN or infinite.
        """
        reference, directory = self.model(checkpoints[-1]), self.directory
        models = partial(self._shown_models, checkpoints, reference)
        if spec.kind == "sparse":
            return fit_coordinates(directory, name, spec, reference, models)
        with samples.named_in_errors():
            if self.recording is None:
                basis = fit_basis(spec, reference, models, samples)
            else:
                basis = recorded_basis(self.recording, reference, len(self.task.train))
        if spec.kind == "gauss-newton":
            assert fisher is not None  # the manifest has one
            with progress_bar("rotation", len(rows) * len(checkpoints), " rows", self.progress) as bar:
                moments = self._second_moments(checkpoints, reference, basis, rows, fisher, bar)
                basis = rotated_basis(basis, spec.dimensions, moments)
        scales = []
        if spec.precision == "int4":
            with samples.named_in_errors():
                scales = [write_column_scales(directory, name, basis, models, samples)]
        return RunFit(reference, basis.dimensions, write_basis(directory, name, basis), scales)

    def _models(self, checkpoints: Sequence[Checkpoint], reference: GradientModel) -> Iterator[GradientModel]:
        """reference: the model of the last of them"""
        yield from map(self.model, checkpoints[:-1])
        yield reference

    def _shown_models(self, checkpoints: Sequence[Checkpoint], reference: GradientModel) -> Iterator[GradientModel]:
        models = self._models(checkpoints, reference)
        yield from progress_bar("fit", len(checkpoints), shown=self.progress, items=models)

    def _second_moments(
        self,
        checkpoints: Sequence[Checkpoint],
        reference: GradientModel,
        basis: Basis,
        rows: Ids,
        fisher: FisherEntry,
        bar: tqdm[Any],
    ) -> Iterator[Tensor]:
        """K of `fitted.gauss_newton` at each checkpoint, in the coordinates of a spectral basis."""
        kind = DenseRows(basis.to(self.device))
        for number, model in enumerate(self._models(checkpoints, reference)):
            stream = _DRAWN_ROWS + number
            moments = SecondMoments(basis.dimensions, len(rows), fisher.output, self.device, basis.seed, stream)
            bad = BadRows({}, self.skip_bad_rows)
            for encoded in encoded_batches(self.reader, self._workers(model, kind), rows, self.batch_size, bad):
                moments.add(encoded.rows, encoded.losses)
                bar.update(len(encoded.losses))
            yield moments.mean()

    def _workers(self, model: GradientModel, kind: RowKind[R], represent: bool = False) -> RowWorkers[R]:
        count = min(_MOST_WORKERS, torch.get_num_threads()) if self.device.type == "cpu" else 1
        return RowWorkers([model, *(model.clone() for _ in range(count - 1))], kind, represent)

    def check(self, manifest: Manifest, grown: bool = False) -> GradientModel:
        """Check that the task is the index's, with or without new rows at its end, and that its next generation could
        be opened. Returns the last checkpoint's model.

        Raises:
            MismatchError: names what differs.
            CheckpointError: the weights of a checkpoint are missing.
            StoreError: the library of the index's searcher is missing.
        """
        check_task(self.task, manifest.task, grown)
        self.probe_on(self._usable(manifest))
        checkpoints = [indexed_checkpoint(self.directory, entry) for entry in manifest.checkpoints]
        if manifest.searcher is not None:
            check_searcher(manifest.searcher.name)
        model = self.model(checkpoints[manifest.last_checkpoint])
        check_probe_losses(self.task, model, manifest.task)
        return model

    def finish(self, pending: Manifest) -> Manifest:
        """Compute what is missing, committing each part, and publish. Returns the published manifest.

        Raises:
            StoreError: the disk is full; what was written is used when run again.
            TaskError: a row's loss or gradient is not finite, or a row cannot be read.
            CheckpointError, MismatchError: weights that are needed are missing, or were changed since the beginning.
        """
        try:
            complete = with_skipped_deleted(self.directory, self._completed(pending))
            message = zero_rows_message(index_rows(self.directory, complete), complete)
            if message is not None:
                warnings.warn(message, stacklevel=2)
            return publish(self.directory, complete)
        except MismatchError as error:
            raise MismatchError(f"{error}; or give up what is unfinished, with `gradtrace discard`") from error

    def _completed(self, manifest: Manifest) -> Manifest:
        """With the curvature and rows of all checkpoints, one after another: each needs its model in memory."""
        bases, tasks = self.bases_of(manifest), missing_shards(manifest)
        total = sum(task.stop - task.start for task in tasks)
        with progress_bar("index", total, " rows", self.progress) as bar:
            for number, entry in enumerate(manifest.checkpoints):
                missing = [task for task in tasks if task.checkpoint == number]
                if entry.kind == "recorded":
                    manifest = self._with_recorded_rows(manifest, missing, bar)
                    continue
                basis = None if manifest.basis.is_sparse else bases[entry.run]
                if basis is None:  # sparse rows are chosen by the curvature, that of a basis is taken from the rows
                    manifest = self._with_curvature(manifest, number, basis, bar)
                kind = self._row_kind(manifest, number, basis)
                if missing:
                    bar.set_description_str(f"rows at {entry.name}", refresh=False)
                    manifest = self._with_rows(manifest, missing, kind, bar)
                check_new_rows(self.directory, manifest, number, kind, self._model_of)
                if basis is not None:
                    manifest = self._with_curvature(manifest, number, basis, bar)
        return manifest

    def _row_kind(self, manifest: Manifest, number: int, basis: Basis | None) -> DenseRows | StrongestOfEach:
        """That of the rows at a checkpoint, whose curvature is known if they are sparse. basis: of rows that are not"""
        if basis is not None:
            return DenseRows(basis)
        curvature = weight_curvature_at(self.directory, manifest, number, load_coordinates(self.directory, manifest))
        assert manifest.basis.damping is not None  # rows are sparse
        whitening = whitening_factors(curvature.eigenvalues, curvature.means, manifest.basis.damping)
        return StrongestOfEach(whitening.to(self.device), manifest.basis.dimensions)

    def _model_of(self, manifest: Manifest, number: int) -> GradientModel:
        return self.model(indexed_checkpoint(self.directory, manifest.checkpoints[number]))

    def _with_curvature(self, manifest: Manifest, number: int, basis: Basis | None, bar: tqdm[Any]) -> Manifest:
        """With the curvature at a checkpoint, if the index has one and lacks it. basis: None where rows are sparse"""
        if not manifest.basis.has_curvature or len(manifest.curvature) > number:
            return manifest
        entry = manifest.checkpoints[number]
        bar.set_description_str(f"curvature at {entry.name}", refresh=False)
        model = partial(self._model_of, manifest, number)
        tensors = checkpoint_curvature(self.directory, manifest, number, basis, self._usable(manifest), model)
        file = write_curvature(self.directory, f"{entry.name}.{manifest.generation}", tensors)
        return save_pending(self.directory, manifest.model_copy(update={"curvature": [*manifest.curvature, file]}))

    def _usable(self, manifest: Manifest) -> Ids:
        return usable_ids(read_row_ids(self.directory, manifest).live_ids(), manifest)

    def _with_rows(
        self, manifest: Manifest, tasks: Sequence[ShardTask], kind: RowKind[Any], bar: tqdm[Any]
    ) -> Manifest:
        """With the rows of these stretches, all at one checkpoint."""
        number = tasks[0].checkpoint
        workers = self._workers(self._model_of(manifest, number), kind, represent=number in manifest.represented)
        for task in tasks:
            bad = BadRows(manifest.skipped, self.skip_bad_rows)
            shard = self._write_shard(manifest, workers, task, bar, bad)
            manifest = save_pending(self.directory, with_shard(manifest.with_skipped(bad.new), shard))
        return manifest

    def _write_shard(
        self, manifest: Manifest, workers: RowWorkers[Any], task: ShardTask, bar: tqdm[Any], bad: BadRows
    ) -> ShardEntry:
        """The rows of one stretch at one checkpoint, in batches counted from its start."""
        ids = read_row_ids(self.directory, manifest).ids[task.start : task.stop]
        with ExitStack() as writers:
            writer = (
                SegmentWriter(self.directory, _rows_name(manifest, task))
                if manifest.basis.is_sparse
                else writers.enter_context(self._row_writer(manifest, task))
            )
            represented = representation_writer(self.directory, manifest, task.checkpoint, task.start, len(ids))
            if represented is not None:
                writers.enter_context(represented)
            columns = write_rows(
                self.reader, workers, ids.tolist(), self.batch_size, writer, bar.update, bad, represented
            )
            rows, segment = writer.commit() if isinstance(writer, SegmentWriter) else (writer.commit(), None)
            representations = None if represented is None else represented.commit()
        name = f"columns/{shard_name(manifest, task.checkpoint, task.start)}.parquet"
        file = write_file(self.directory, name, columns.parquet())
        return ShardEntry(**task._asdict(), rows=rows, representations=representations, columns=file, segment=segment)

    def _row_writer(self, manifest: Manifest, task: ShardTask) -> ShardWriter:
        layout = ShardLayout(task.stop - task.start, tuple(manifest.levels), manifest.precision)
        scales = load_column_scales(self.directory, manifest)  # by training run
        run_scales = scales[manifest.checkpoints[task.checkpoint].run] if scales else None
        return ShardWriter(self.directory, _rows_name(manifest, task), layout, run_scales)

    def _with_recorded_rows(self, manifest: Manifest, tasks: Sequence[ShardTask], bar: tqdm[Any]) -> Manifest:
        """With the recorded rows of these stretches, and the columns of the trained model."""
        for task in tasks:
            assert self.recording is not None  # only a build with the recording resumes one
            with self._row_writer(manifest, task) as writer:
                for start in range(task.start, task.stop, self.batch_size):
                    rows = self.recording.hydra_rows[start : min(start + self.batch_size, task.stop)]
                    writer.append(torch.from_numpy(rows.copy()))
                    bar.update(len(rows))
                entry = writer.commit()
            trained = (manifest.last_checkpoint, task.start)
            columns = next(shard.columns for shard in manifest.shards if (shard.checkpoint, shard.start) == trained)
            shard = ShardEntry(**task._asdict(), rows=entry, columns=columns)
            manifest = save_pending(self.directory, with_shard(manifest, shard))
        return manifest


def _rows_name(manifest: Manifest, task: ShardTask) -> str:
    return f"rows/{shard_name(manifest, task.checkpoint, task.start)}.rows"
