"""What builds and updates share: the models at checkpoints, made one at a time, and how rows go through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from typing_extensions import TypedDict

from gradtrace.basis import Basis, check_layers, load_bases
from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.indexed import indexed_checkpoint
from gradtrace.data.dataset import fetch
from gradtrace.data.sample import SAMPLE_ROWS, varied_rows
from gradtrace.devices import pick_device
from gradtrace.errors import StoreError
from gradtrace.fingerprint import check_probe_losses, check_task
from gradtrace.models.examination import Examination
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.path_report import summary, warn_of_slow_paths
from gradtrace.recording import Recording
from gradtrace.sparse.coordinates import load_coordinates
from gradtrace.store.manifest import CheckpointEntry, Manifest
from gradtrace.store.row_ids import Ids, read_row_ids
from gradtrace.task import Example, Task
from gradtrace_indexer.build.bad_rows import usable_ids
from gradtrace_indexer.build.row_kinds import R, RowKind
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.build.rows import RowWorkers
from gradtrace_indexer.progress import note
from gradtrace_indexer.searchers import check_searcher
from gradtrace_indexer.work.board import Board, Plan
from gradtrace_indexer.work.sharing import Rank

_MOST_WORKERS = 8  # copies of the model


class PassOptions(TypedDict, total=False):
    """How training rows are read and differentiated; none of it changes what an index answers.

    batch_size: examples that go through the model together; default 128.
    num_workers: processes that read the training data ahead, as those of PyTorch's DataLoader; 0 (default): none.
    device: "auto" (default), "cpu", "cuda", "cuda:1" ...
    progress: show how far it is; default True.
    rank: this process is one of several that share the work, as a scheduler started them; None (default): it is not.
    """

    batch_size: int
    num_workers: int
    device: str
    progress: bool
    rank: Rank | None


class WorkOptions(PassOptions, total=False):
    """And who does the work; none of it changes a byte of the index.

    workers: processes of this machine that share the work, or with `ray` actors; default 1, this process itself.
    ray: address of a Ray cluster whose actors do the work, one on each CPU or GPU if `workers` is not given; "auto", or
        "local" for one of this machine alone.
    load: makes the task in each worker process; default: it is sent there.
    """

    workers: int | None
    ray: str | None
    load: Callable[[], Task] | None


class Builder:
    """Owns the models that a build or an update takes.

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
        rank: Rank | None = None,
        skip_bad_rows: bool = False,
    ) -> None:
        """
        Args:
            skip_bad_rows: where a row cannot be read, or its loss or gradient is NaN or infinite at a checkpoint, mark
                it as deleted (`manifest.skipped` has the reason) instead of stopping.
            The others: see `PassOptions`.

        Raises:
            StoreError: batch_size < 1 or num_workers < 0.
        """
        if batch_size < 1:
            raise StoreError(f"batch_size must be at least 1, not {batch_size}")
        self.task, self.directory, self.device = task, directory, torch.device(pick_device(device))
        self.batch_size, self.progress, self.rank = batch_size, progress, rank
        self.recording: Recording | None = None  # where the rows of a recorded column block come from
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

    def indexed_model(self, entry: CheckpointEntry) -> GradientModel:
        """The model at a checkpoint of the index. Raises CheckpointError where its weights are missing or changed."""
        return self.model(indexed_checkpoint(self.directory, entry))

    @property
    def plan(self) -> Plan:
        return Plan(batch_size=self.batch_size, skip_bad_rows=self.skip_bad_rows)

    def follow(self, plan: Plan) -> None:
        """Read and differentiate rows as the coordinator of the work does."""
        self.batch_size, self.skip_bad_rows = plan.batch_size, plan.skip_bad_rows

    def board(self, generation: int) -> Board:
        """What is done of an unfinished generation, and by whom."""
        rank = self.rank
        if rank is None:
            return Board(self.directory, generation)
        return Board(self.directory, generation, shared=True, rank=rank.number, world=rank.world)

    def workers(self, model: GradientModel, kind: RowKind[R], represent: bool = False) -> RowWorkers[R]:
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
        self.probe_on(usable_ids(read_row_ids(self.directory, manifest).live_ids(), manifest))
        checkpoints = [indexed_checkpoint(self.directory, entry) for entry in manifest.checkpoints]
        if manifest.searcher is not None:
            check_searcher(manifest.searcher.name)
        model = self.model(checkpoints[manifest.last_checkpoint])
        check_probe_losses(self.task, model, manifest.task)
        return model
