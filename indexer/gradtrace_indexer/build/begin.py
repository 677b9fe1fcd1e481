"""The beginning of a build: its bases are fitted, and the first generation is committed without rows."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gradtrace.basis import load_basis
from gradtrace.checkpoints import Checkpoint
from gradtrace.errors import MismatchError, StoreError
from gradtrace.fingerprint import check_task, task_entry
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.loss_output import row_fisher
from gradtrace.sparse.segments import default_segment_rows
from gradtrace.sparse.whitening import DAMPING, WEIGHT_FISHER
from gradtrace.store.manifest import (
    BasisEntry,
    CheckpointEntry,
    FileEntry,
    FisherEntry,
    Manifest,
    Precision,
    RepresentationsEntry,
    TaskEntry,
)
from gradtrace.store.regular_files import regular_path
from gradtrace.store.row_ids import Ids
from gradtrace.store.shards import ShardLayout, default_levels
from gradtrace.store.tensors import load_tensors
from gradtrace.user_code import check_methods
from gradtrace_indexer.build.bad_rows import BadRows, Screening
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.build.fit import FitSpec, RunFit, Samples, sample_rows, write_basis
from gradtrace_indexer.build.moments import MomentSums, PartialSum, mean_moments
from gradtrace_indexer.build.run_fit import RunFitting
from gradtrace_indexer.generations import save_pending
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.work.board import Board, Step, StepRecord
from gradtrace_indexer.writing.files import write_file
from gradtrace_indexer.writing.format_files import remove_file

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 32_768

DRAFT = "draft"

Runs = Sequence[Sequence[Checkpoint]]  # the checkpoints of each training run


class Draft(BaseModel):
    """A shared build whose Gauss-Newton bases are still to be rotated.

    bases: spectral ones, one for each training run
    dimensions: of each
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskEntry
    requested: int
    seed: int
    precision: Precision
    checkpoints: list[CheckpointEntry]
    skip_bad_rows: bool
    skipped: dict[int, str]
    fisher: FisherEntry
    bases: list[FileEntry]
    dimensions: list[int]

    def is_of(self, builder: Builder, entries: list[CheckpointEntry], spec: FitSpec) -> bool:
        """Whether it is a draft of this build."""
        asked = spec.dimensions, spec.seed, spec.precision, builder.skip_bad_rows, entries
        if asked != (self.requested, self.seed, self.precision, self.skip_bad_rows, self.checkpoints):
            return False
        try:
            check_task(builder.task, self.task)
        except MismatchError:
            return False
        return True


class _Screened(NamedTuple):
    """good: the sampled rows that are not bad;  skipped: those that are, with the reason;  live: all others"""

    good: Ids
    skipped: dict[int, str]
    live: Ids


def begin(builder: Builder, runs: Runs, entries: list[CheckpointEntry], spec: FitSpec) -> Manifest:
    """Fit the bases, and commit a manifest without rows.

    entries: the manifest's, of the checkpoints of all runs
    """
    board = builder.board(1)
    if board.shared and spec.kind == "gauss-newton" and builder.recording is None:
        with board.coordinated(builder.plan):
            return _begin_together(builder, board, runs, entries, spec)
    screened = _screened(builder, runs, spec.seed)
    samples = Samples(builder.task, spec.seed, len(builder.task.train), screened.good)
    fisher = _fisher(builder.model(runs[0][-1]), spec, samples)  # the model that the first fit begins with
    fits = [_fitting(builder, run, number, spec, samples).fit(screened.live, fisher) for number, run in enumerate(runs)]
    return save_pending(builder.directory, _manifest(builder, entries, spec, screened, fisher, fits))


def _fitting(builder: Builder, run: Sequence[Checkpoint], number: int, spec: FitSpec, samples: Samples) -> RunFitting:
    return RunFitting(builder, run, f"{number}.1", spec, samples)


def _begin_together(
    builder: Builder, board: Board, runs: Runs, entries: list[CheckpointEntry], spec: FitSpec
) -> Manifest:
    """As `begin`, while other workers take a share of the passes over all rows."""
    draft = board.read(DRAFT, Draft)
    if draft is None or not draft.is_of(builder, entries, spec):
        board.drop(DRAFT)  # nobody works on another build's any more
        draft = _draft(builder, board, runs, entries, spec)
        board.write(DRAFT, draft)
    screened = _screened_before(builder, draft)
    sums = _moment_sums(builder, draft, screened.live)
    steps = _moment_steps(builder, board, draft, sums)
    board.announce(steps)
    with progress_bar("rotation", sum(step.units for step in steps), " rows", builder.progress) as bar:
        board.work_off(steps, bar)
    samples = Samples(builder.task, spec.seed, draft.task.train_rows, screened.good)
    fits = []
    for number, run in enumerate(runs):
        moments = _moments_of_run(board, draft, number, sums[number])
        fits.append(_fitting(builder, run, number, spec, samples).rotated(sums[number].basis, moments))
    manifest = save_pending(builder.directory, _manifest(builder, entries, spec, screened, draft.fisher, fits))
    for step in steps:
        remove_file(builder.directory, _moments_file(board, step.name).path)
    return manifest


def _draft(builder: Builder, board: Board, runs: Runs, entries: list[CheckpointEntry], spec: FitSpec) -> Draft:
    screened = _screened(builder, runs, spec.seed)
    samples = Samples(builder.task, spec.seed, len(builder.task.train), screened.good)
    fisher = _fisher(builder.model(runs[0][-1]), spec, samples)
    assert fisher is not None  # the basis is a Gauss-Newton one
    bases = [_fitting(builder, run, number, spec, samples).first_basis() for number, run in enumerate(runs)]
    return Draft(
        task=task_entry(builder.task, builder.model(runs[-1][-1]), screened.good),
        requested=spec.dimensions,
        seed=spec.seed,
        precision=spec.precision,
        checkpoints=entries,
        skip_bad_rows=builder.skip_bad_rows,
        skipped=screened.skipped,
        fisher=fisher,
        bases=[
            write_basis(builder.directory, f"{number}.1", basis, board.folder) for number, basis in enumerate(bases)
        ],
        dimensions=[basis.dimensions for basis in bases],
    )


def _screened_before(builder: Builder, draft: Draft) -> _Screened:
    """What the draft's coordinator found; models are examined on the same rows from now on."""
    rows, bad = np.arange(draft.task.train_rows), list(draft.skipped)
    if not draft.skip_bad_rows:
        return _Screened(rows, {}, rows)
    good = np.setdiff1d(sample_rows(draft.seed, len(rows)), bad)
    builder.probe_on(good)
    return _Screened(good, draft.skipped, np.setdiff1d(rows, bad))


def _moment_sums(builder: Builder, draft: Draft, live: Ids) -> list[MomentSums]:
    """One for each training run. live: the rows that are not bad"""
    paths = [regular_path(builder.directory, file.path) for file in draft.bases]
    bases = [
        load_basis(path, "spectral", dimensions, draft.seed)
        for path, dimensions in zip(paths, draft.dimensions, strict=True)
    ]
    return [MomentSums(builder, basis, live, draft.fisher) for basis in bases]


def steps_of_draft(builder: Builder, board: Board, draft: Draft) -> list[Step]:
    """For a helper: of each checkpoint and stretch of rows, the sum of second moments.

    Raises:
        MismatchError: the draft is of another task.
    """
    check_task(builder.task, draft.task)
    return _moment_steps(builder, board, draft, _moment_sums(builder, draft, _screened_before(builder, draft).live))


def _moment_steps(builder: Builder, board: Board, draft: Draft, sums: Sequence[MomentSums]) -> list[Step]:
    board.turn_to(draft.model_dump_json().encode())
    steps = []
    for position, entry in enumerate(draft.checkpoints):
        of_run = sums[entry.run]
        for start, stop in of_run.stretches():
            name, title = _moments(position, start), f"rotation at {entry.name}"
            number = sum(other.run == entry.run for other in draft.checkpoints[:position])
            compute = partial(_write_moments, builder, board, of_run, entry, number, start, name)
            steps.append(Step(name, title, compute, position, stop - start))
    return steps


def _write_moments(
    builder: Builder,
    board: Board,
    sums: MomentSums,
    entry: CheckpointEntry,
    number: int,
    start: int,
    step: str,
    on_units: Callable[[int], object],
) -> StepRecord:
    total, rows = sums.of_stretch(builder.indexed_model(entry), number, start, on_units)
    content = safetensors.torch.save({"total": total.cpu(), "rows": torch.tensor(rows)})
    name = f"{board.folder}/{step}.{board.work}.safetensors"  # a worker of another draft does not write over it
    return StepRecord(file=write_file(builder.directory, name, content))


def _moments_file(board: Board, step: str) -> FileEntry:
    record = board.record(step)
    assert record is not None  # the step is done
    assert record.file is not None
    return record.file


def _moments_of_run(board: Board, draft: Draft, run: int, sums: MomentSums) -> Iterator[Tensor]:
    """K at each of a run's checkpoints, from what workers have written."""
    for position, entry in enumerate(draft.checkpoints):
        if entry.run == run:
            files = [_moments_file(board, _moments(position, start)) for start, _ in sums.stretches()]
            paths = [regular_path(board.directory, file.path) for file in files]
            read = (load_tensors(path, "run `gradtrace discard`, and build again") for path in paths)
            yield mean_moments(PartialSum(tensors["total"], int(tensors["rows"])) for tensors in read)


def _moments(position: int, start: int) -> str:
    return f"moments-{position:03d}-{start:09d}"


def _manifest(
    builder: Builder,
    entries: list[CheckpointEntry],
    spec: FitSpec,
    screened: _Screened,
    fisher: FisherEntry | None,
    fits: Sequence[RunFit],
) -> Manifest:
    """That of the first generation, without rows."""
    rows, reference = len(builder.task.train), fits[-1].reference
    dimensions = check_dimensions(fits, fits[0].dimensions)
    levels = [dimensions] if spec.kind == "sparse" else default_levels(dimensions)
    representation = reference.representation
    represented = representation and RepresentationsEntry(
        source=representation.source, dimensions=representation.dimensions
    )
    manifest = Manifest(
        generation=1,
        complete=False,
        task=task_entry(builder.task, reference, screened.good),
        checkpoints=entries,
        basis=BasisEntry(
            kind=spec.kind,
            dimensions=dimensions,
            requested=spec.dimensions,
            seed=spec.seed,
            fitted_rows=rows,
            files=[fit.basis for fit in fits],
            damping=DAMPING if spec.kind == "sparse" else None,
        ),
        curvature=[],
        fisher=fisher,
        precision=spec.precision,
        column_scales=[file for fit in fits for file in fit.column_scales],
        levels=levels,
        rows=rows,
        representations=represented,
        shard_rows=_shard_rows(spec, levels),
        shards=[],
        libraries={"gradtrace": version("gradtrace"), "torch": torch.__version__, "python": platform.python_version()},
    )
    return manifest.with_skipped(screened.skipped)


def _shard_rows(spec: FitSpec, levels: Sequence[int]) -> int:
    if spec.kind == "sparse":
        return default_segment_rows(levels[-1])
    bytes_of_1024_rows = ShardLayout(1024, tuple(levels), spec.precision).bytes
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES * 1024 // bytes_of_1024_rows))


def _screened(builder: Builder, runs: Runs, seed: int) -> _Screened:
    """Which of some sampled rows are bad at a checkpoint; from now on models are examined on some of the others."""
    rows = np.arange(len(builder.task.train))
    if not builder.skip_bad_rows:
        return _Screened(rows, {}, rows)
    bad = BadRows({}, skipping=True)
    screening = Screening(builder.task, builder.reader, sample_rows(seed, len(rows)).tolist(), bad)
    checkpoints = list(chain.from_iterable(runs))
    for checkpoint in checkpoints:
        screening.by_losses(checkpoint, builder.device)
    builder.probe_on(np.array(screening.good))
    for checkpoint in checkpoints:
        screening.by_gradients(builder.model(checkpoint))
    builder.probe_on(np.array(screening.good))
    check_methods(builder.task, [builder.task.train[row] for row in screening.good[:2]])
    return _Screened(np.array(screening.good), bad.new, np.setdiff1d(rows, list(bad.new)))


def _fisher(model: GradientModel, spec: FitSpec, samples: Samples) -> FisherEntry | None:
    """What the curvature is; None for a basis without one."""
    if spec.kind == "gauss-newton":
        with samples.named_in_errors():
            return row_fisher(model, next(iter(samples)))
    if spec.kind == "sparse":
        return WEIGHT_FISHER
    return _label_fisher(model) if spec.kind == "spectral" else None


def _label_fisher(model: GradientModel) -> FisherEntry:
    """Warns where the curvature is not that of the whole loss, at labels that the model would give."""
    outputs = model.outputs
    if outputs.source == "empirical":
        warnings.warn(
            f"the curvature is the {outputs.fisher.sentence}. Scores of influence and source are worse for it. Let the "
            "loss call PyTorch's loss functions on the model's outputs, and do no more with what they return than to "
            "weigh and sum it; or define predict and with_label",
            stacklevel=2,
        )
    if outputs.loss is not None and outputs.loss.has_other_terms:
        warnings.warn(
            f"the curvature is that of a part of the loss: {', '.join(outputs.loss.functions)}. The other terms call "
            "no loss function of PyTorch, so that theirs is not known",
            stacklevel=2,
        )
    return outputs.fisher


def check_dimensions(fits: Sequence[RunFit], dimensions: int) -> int:
    """Returns the number of dimensions; raises StoreError unless the bases of all runs have it."""
    fitted = {fit.dimensions for fit in fits}
    if fitted != {dimensions}:
        raise StoreError(
            f"the gradients of a training run have {min(fitted)} independent coordinates, those of another "
            f"{max(dimensions, *fitted)}: build with dimensions={min(dimensions, *fitted)}"
        )
    return dimensions
