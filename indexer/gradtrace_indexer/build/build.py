"""Build an index: fit the bases once, then compute the rows of every checkpoint."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from typing_extensions import Unpack

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.indexed import checkpoint_entries
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError, RecordingError, StoreError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.loss_output import row_fisher
from gradtrace.opening import open_examined
from gradtrace.recording import read_recording
from gradtrace.recording.files import ROWS_NAME
from gradtrace.sparse.defaults import DEFAULT_DIMENSIONS, RowsOption, default_rows
from gradtrace.sparse.segments import default_segment_rows
from gradtrace.sparse.whitening import DAMPING, WEIGHT_FISHER
from gradtrace.store.manifest import (
    MANIFEST_NAME,
    BasisEntry,
    BasisKind,
    CheckpointEntry,
    FisherEntry,
    Manifest,
    Precision,
    RepresentationsEntry,
)
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import Ids
from gradtrace.store.shards import ShardLayout, default_levels
from gradtrace.task import Task
from gradtrace.user_code import check_methods
from gradtrace_indexer.build.averages import with_averages
from gradtrace_indexer.build.bad_rows import BadRows, Screening
from gradtrace_indexer.build.builder import Builder, PassOptions
from gradtrace_indexer.build.fit import FitSpec, RunFit, Samples, sample_rows
from gradtrace_indexer.generations import save_pending, unfinished
from gradtrace_indexer.searchers import check_searcher, set_searcher
from gradtrace_indexer.writing.files import sole_writer

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 32_768
_LONGEST_NAME = 200  # bytes; file systems allow 255, and more follows in an index's file names

Runs = Sequence[Sequence[Checkpoint]]  # the checkpoints of each training run


def build_index(
    task: Task,
    checkpoints: Sequence[Checkpoint] | Runs | str | Path,
    path: str | Path,
    *,
    rows: RowsOption | None = None,
    dimensions: int | None = None,
    basis: BasisKind | None = None,
    precision: Precision = "int8",
    seed: int = 0,
    searcher: str | None = None,
    average_segments: int | None = None,
    recording: str | Path | None = None,
    skip_bad_rows: bool = False,
    **passes: Unpack[PassOptions],
) -> Index:
    """Build the index of a task's training rows. An interrupted build is resumed, a finished one only opened.

    checkpoints: in training order, the last one the basis's reference; or their directory; or, of several training runs
        of the task (other seeds), a sequence for each: scores are then means over the runs.
    rows: "dense", all in the coordinates of a basis; "sparse", each in the strongest of its own, which tell texts apart
        better (docs/language-models.md); None: sparse for models that predict the tokens they read, else dense.
    dimensions: of a dense row, the columns kept for each checkpoint, by default 2048; of a sparse one the coordinates,
        by default 1024.
    basis: of dense rows; None: "gauss-newton".
    average_segments: index averages of the weights over so many segments, and the last checkpoint: for `fast-source`.
    recording: directory of an `InfluenceRecorder`, for `hydra`; its basis, dimensions and seed are then the index's.
    skip_bad_rows: mark rows that cannot be read or have no finite gradient as deleted instead of stopping.
    The other arguments: see `FitSpec`, `PassOptions` and, for `searcher`, `set_searcher` (None: as it is, or exact).

    Raises: StoreError: another build lies at `path` or is running there, or the disk is full.
        RecordingError: the recording is unfinished, damaged, or of another training.
        TaskError, CheckpointError: see their subclasses; nothing is written before the task was checked.
    """
    check_dataset(task, skip_unreadable=skip_bad_rows)
    if rows is None and (recording is not None or searcher not in (None, "progressive")):
        rows = "dense"
    spec = fit_spec(task, rows, dimensions, basis, seed, precision)
    if spec.kind == "sparse" and (recording is not None or searcher not in (None, "progressive")):
        raise StoreError(
            "sparse rows take no recording and no other searcher than their own, which is exact: leave these out, or "
            'build with rows="dense"'
        )
    recorded = None if recording is None else read_recording(recording)
    builder = Builder(task, Path(path), skip_bad_rows=skip_bad_rows, recording=recorded, **passes)
    if searcher is not None:
        check_searcher(searcher)
    _build(builder, checkpoints, spec, average_segments)
    device = passes.get("device", "auto")
    if searcher is not None:
        return set_searcher(path, task, searcher, device=device, progress=builder.progress)
    return open_examined(path, task, builder.examination, device=device)


def fit_spec(
    task: Task,
    rows: RowsOption | None,
    dimensions: int | None,
    basis: BasisKind | None,
    seed: int,
    precision: Precision,
) -> FitSpec:
    """The rows that a build's options ask for, and their defaults.

    Raises:
        StoreError: the options do not go together.
    """
    if rows not in (None, *get_args(RowsOption)):
        raise StoreError(f"rows must be one of {', '.join(get_args(RowsOption))}, not {rows!r}")
    if basis == "sparse":
        raise StoreError('basis "sparse" is none that can be asked for: build with rows="sparse"')
    if rows == "sparse" and basis is not None:
        raise StoreError(f'sparse rows have no basis: leave basis {basis!r} out, or build with rows="dense"')
    if rows is None:
        rows = default_rows(task) if basis is None and precision == "int8" else "dense"
    kind: BasisKind = "sparse" if rows == "sparse" else basis or "gauss-newton"
    return FitSpec(kind, DEFAULT_DIMENSIONS[rows] if dimensions is None else dimensions, seed, precision)


def _build(
    builder: Builder, checkpoints: Sequence[Checkpoint] | Runs | str | Path, spec: FitSpec, average_segments: int | None
) -> None:
    """Check everything, then begin or resume the build, and publish it."""
    task, recording, rows = builder.task, builder.recording, len(builder.task.train)
    if not builder.skip_bad_rows:  # else it is not known yet which rows can be read
        check_methods(task, [task.train[row] for row in range(min(2, rows))])
    runs = _by_run(load_checkpoints(checkpoints) if isinstance(checkpoints, str | Path) else checkpoints)
    if recording is not None:
        if len(runs) > 1:
            raise RecordingError("a recording is of one training run: give the checkpoints of that run alone")
        spec = FitSpec(recording.basis.kind, recording.entry.requested, recording.entry.seed, spec.precision)
    with sole_writer(builder.directory):
        if average_segments is not None:
            runs = [with_averages(builder.directory, task, run, average_segments) for run in runs]
        manifest = _existing(builder, runs, rows, spec) or _begin(builder, runs, rows, spec)
        if not manifest.complete:
            builder.finish(manifest)


def _by_run(checkpoints: Sequence[Checkpoint] | Runs) -> Runs:
    """Raises CheckpointError as `check_order` for a run's, or the same weights in two runs."""
    is_single_run = all(isinstance(checkpoint, Checkpoint) for checkpoint in checkpoints)
    runs = cast(Runs, [checkpoints] if is_single_run else list(checkpoints))
    for run in runs:
        check_order(run)
    paths = [run[-1].path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise CheckpointError(f"the same training run was given twice ({paths[-1]}): name each run's checkpoints once")
    return runs


def _entries(builder: Builder, runs: Runs) -> list[CheckpointEntry]:
    by_run = [checkpoint_entries(builder.directory, run, builder.task, number) for number, run in enumerate(runs)]
    entries = list(chain.from_iterable(by_run))
    if builder.recording is not None:  # of a training that ended with the weights of the last checkpoint
        file = next(file for file in builder.recording.entry.files if file.path == ROWS_NAME)
        recorded = {"name": "recording", "kind": "recorded", "recording": file.xxh3}
        entries.append(entries[-1].model_copy(update=recorded))
    return entries


def check_order(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointError if there are none, or not in training order, or two have the same name, or a name is too
    long for the files that it names."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    if not checkpoints or len({checkpoint.name for checkpoint in checkpoints}) < len(checkpoints):
        raise CheckpointError("checkpoints must be given, each once, with distinct file names")
    if steps != sorted(set(steps)):
        raise CheckpointError(f"checkpoints must be given in training order; their steps are {steps}")
    for name in (checkpoint.name for checkpoint in checkpoints):
        if len(name.encode()) > _LONGEST_NAME:
            raise CheckpointError(
                f"the checkpoint's file name {name[:60]}... has {len(name.encode())} bytes, and an index's files "
                f"carry it with more behind it: rename it to {_LONGEST_NAME} bytes at most, in checkpoints.json too"
            )


def _existing(builder: Builder, runs: Runs, rows: int, spec: FitSpec) -> Manifest | None:
    """The manifest of the same build, finished or not; None where the directory holds none.

    Raises:
        StoreError: the directory holds another index: other arguments, or (MismatchError) another task.
    """
    directory = builder.directory
    manifest = unfinished(directory)
    if (directory / MANIFEST_NAME).exists():
        manifest = read_manifest(directory)
    if manifest is None:
        return None
    compared = {
        "rows": (rows, manifest.task.train_rows),
        "basis": (spec.kind, manifest.basis.kind),
        "dimensions": (spec.dimensions, manifest.basis.requested),
        "precision": (spec.precision, manifest.precision),
        "seed": (spec.seed, manifest.basis.seed),
        "checkpoints": (_entries(builder, runs), manifest.checkpoints),
    }
    differing = [name for name, (asked, existing) in compared.items() if asked != existing]
    if differing:
        raise StoreError(
            f"{directory} already holds another index (other {', '.join(differing)}): choose another directory, remove "
            "this one first, or bring it up to date with `gradtrace update` (checkpoints) or `gradtrace append` (rows)"
        )
    builder.check(manifest)
    return manifest


def _begin(builder: Builder, runs: Runs, rows: int, spec: FitSpec) -> Manifest:
    """Fit the bases, and commit a manifest without rows."""
    bad = BadRows({}, builder.skip_bad_rows)
    good = _screened(builder, runs, sample_rows(spec.seed, rows).tolist(), bad) if bad.skipping else np.arange(rows)
    samples = Samples(builder.task, spec.seed, rows, good)
    live = np.setdiff1d(np.arange(rows), list(bad.new))
    fisher = _fisher(builder.model(runs[0][-1]), spec, samples)  # the model that the first fit begins with
    fits = [builder.fit(run, f"{number}.1", spec, samples, live, fisher) for number, run in enumerate(runs)]
    reference, dimensions = fits[-1].reference, check_dimensions(fits, fits[0].dimensions)
    levels = [dimensions] if spec.kind == "sparse" else default_levels(dimensions)
    representation = reference.representation
    represented = representation and RepresentationsEntry(
        source=representation.source, dimensions=representation.dimensions
    )
    manifest = Manifest(
        generation=1,
        complete=False,
        task=task_entry(builder.task, reference, good),
        checkpoints=_entries(builder, runs),
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
    return save_pending(builder.directory, manifest.with_skipped(bad.new))


def _shard_rows(spec: FitSpec, levels: Sequence[int]) -> int:
    if spec.kind == "sparse":
        return default_segment_rows(levels[-1])
    bytes_of_1024_rows = ShardLayout(1024, tuple(levels), spec.precision).bytes
    return max(1, min(_SHARD_ROWS, _SHARD_BYTES * 1024 // bytes_of_1024_rows))


def _screened(builder: Builder, runs: Runs, rows: Sequence[int], bad: BadRows) -> Ids:
    """The rows that are not bad at any checkpoint; from now on models are examined on some of these."""
    screening = Screening(builder.task, builder.reader, rows, bad)
    checkpoints = list(chain.from_iterable(runs))
    for checkpoint in checkpoints:
        screening.by_losses(checkpoint, builder.device)
    builder.probe_on(np.array(screening.good))
    for checkpoint in checkpoints:
        screening.by_gradients(builder.model(checkpoint))
    builder.probe_on(np.array(screening.good))
    check_methods(builder.task, [builder.task.train[row] for row in screening.good[:2]])
    return np.array(screening.good)


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
