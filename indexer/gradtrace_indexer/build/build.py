"""Build an index: fit the bases once, then compute the rows of every checkpoint."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError, RecordingError, StoreError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.opening import open_index
from gradtrace.recording import read_recording
from gradtrace.store.manifest import (
    MANIFEST_NAME,
    BasisEntry,
    BasisKind,
    CheckpointEntry,
    FisherEntry,
    Manifest,
    Precision,
    RepresentationsEntry,
    read_manifest,
)
from gradtrace.store.precision import STORED_DTYPES
from gradtrace.store.row_ids import Ids
from gradtrace.store.shards import ShardLayout, default_levels
from gradtrace.task import Task
from gradtrace.user_code import check_methods
from gradtrace_indexer.build.averages import with_averages
from gradtrace_indexer.build.bad_rows import BadRows, Screening
from gradtrace_indexer.build.builder import Builder, checkpoint_entries
from gradtrace_indexer.build.fit import FitSpec, RunFit, Samples, sample_rows
from gradtrace_indexer.build.recorded import recorded_entry
from gradtrace_indexer.generations import save_pending, unfinished
from gradtrace_indexer.searchers.build import check_searcher, set_searcher
from gradtrace_indexer.writing.files import sole_writer

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 32_768


def build_index(
    task: Task,
    checkpoints: Sequence[Checkpoint] | Sequence[Sequence[Checkpoint]] | str | Path,
    path: str | Path,
    *,
    dimensions: int = 2048,
    basis: BasisKind = "spectral",
    precision: Precision = "int8",
    batch_size: int = 128,
    seed: int = 0,
    searcher: str | None = None,
    average_segments: int | None = None,
    recording: str | Path | None = None,
    num_workers: int = 0,
    skip_bad_rows: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Build the index of a task's training rows, or go on with an interrupted build; a finished one is just opened.

    Args:
        checkpoints: in training order, or their directory; the last one is the reference of the basis. Of several
            training runs of the task (other seeds), a sequence for each: then scores are means over the runs.
        dimensions: columns kept for each checkpoint; at most the number of parameters.
        precision: of the stored rows, see docs/choosing.md.
        searcher: "progressive", "faiss:FACTORY" or "annoy:TREES", see `set_searcher`; None: the one that is there, or
            exact search.
        average_segments: index the averages of the weights over so many segments of each run in place of all its
            checkpoints but the last, for `fast-source`; less to store and to compute, and nothing for methods that sum
            over checkpoints.
        recording: directory of an `InfluenceRecorder`; its rows are stored for the method `hydra`, and its basis,
            dimensions and seed are those of the index, whatever else is given. The last checkpoint must hold the
            weights that the recorded training ended with.
        num_workers: processes that read the training data ahead, as those of PyTorch's DataLoader; 0: this one reads.
        skip_bad_rows: where a row cannot be read, or its loss or gradient is NaN or infinite at a checkpoint, mark it
            as deleted (`manifest.skipped` has the reason) instead of stopping.

    Raises:
        StoreError: another build lies at `path` or is running there, or the disk is full.
        RecordingError: the recording is unfinished, damaged, or of another training.
        TaskError, CheckpointError: see their subclasses; nothing is written before the task was checked.
    """
    directory = Path(path)
    if precision not in STORED_DTYPES:
        raise StoreError(f"precision must be one of {', '.join(STORED_DTYPES)}, not {precision!r}")
    rows = check_dataset(task, skip_unreadable=skip_bad_rows)
    if not skip_bad_rows:  # else it is not known yet which rows can be read
        check_methods(task, [task.train[row] for row in range(min(2, rows))])
    runs = _by_run(load_checkpoints(checkpoints) if isinstance(checkpoints, str | Path) else checkpoints)
    if searcher is not None:
        check_searcher(searcher)
    recorded = None if recording is None else read_recording(recording)
    builder = Builder(task, directory, device, batch_size, progress, recorded, num_workers, skip_bad_rows)
    if recorded is not None:
        if len(runs) > 1:
            raise RecordingError("a recording is of one training run: give the checkpoints of that run alone")
        basis, dimensions, seed = recorded.basis.kind, recorded.entry.requested, recorded.entry.seed
    spec = FitSpec(basis, dimensions, seed, precision)
    with sole_writer(directory):
        if average_segments is not None:
            runs = [with_averages(directory, task, own, average_segments) for own in runs]
        manifest = _found(builder, runs, rows, spec) or _begun(builder, runs, rows, spec)
        if not manifest.complete:
            builder.finish(manifest)
    if searcher is not None:
        return set_searcher(directory, task, searcher, device=device, progress=progress)
    return open_index(directory, task, device=device)


def _by_run(checkpoints: Sequence[Checkpoint] | Sequence[Sequence[Checkpoint]]) -> list[Sequence[Checkpoint]]:
    """Raises CheckpointError as `check_order` for a run's, or the same weights in two runs."""
    one = all(isinstance(checkpoint, Checkpoint) for checkpoint in checkpoints)
    runs = cast(list[Sequence[Checkpoint]], [checkpoints] if one else list(checkpoints))
    for run in runs:
        check_order(run)
    paths = [run[-1].path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise CheckpointError(f"the same training run was given twice ({paths[-1]}): name each run's checkpoints once")
    return runs


def _entries(builder: Builder, runs: Sequence[Sequence[Checkpoint]]) -> list[CheckpointEntry]:
    found = (checkpoint_entries(builder.directory, own, builder.task, run) for run, own in enumerate(runs))
    entries = [entry for own in found for entry in own]
    return entries if builder.recording is None else [*entries, recorded_entry(builder.recording, entries[-1])]


def check_order(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointError if there are none, or not in training order, or not with names of their own."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    if not checkpoints or len({checkpoint.name for checkpoint in checkpoints}) < len(checkpoints):
        raise CheckpointError("checkpoints must be given, each once, with distinct file names")
    if steps != sorted(set(steps)):
        raise CheckpointError(f"checkpoints must be given in training order; their steps are {steps}")


def _found(builder: Builder, runs: Sequence[Sequence[Checkpoint]], rows: int, spec: FitSpec) -> Manifest | None:
    """The manifest of the same build, finished or not; None where there is none.

    Raises:
        StoreError: there is one of another thing: other arguments, or (MismatchError) another task.
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
    differing = [name for name, (wanted, found) in compared.items() if wanted != found]
    if differing:
        raise StoreError(
            f"{directory} already holds another index (other {', '.join(differing)}): choose another directory, remove "
            "this one first, or bring it up to date with `gradtrace update` (checkpoints) or `gradtrace append` (rows)"
        )
    builder.check(manifest)
    return manifest


def _begun(builder: Builder, runs: Sequence[Sequence[Checkpoint]], rows: int, spec: FitSpec) -> Manifest:
    """Fit the bases, and commit a manifest without rows."""
    bad = BadRows({}, builder.skip_bad_rows)
    good = _screened(builder, runs, sample_rows(spec.seed, rows).tolist(), bad) if bad.skipping else np.arange(rows)
    samples = Samples(builder.task, spec.seed, rows, good)
    fits = [builder.fit(own, f"{run}.1", spec, samples) for run, own in enumerate(runs)]
    dimensions = check_dimensions(fits, fits[0].dimensions)
    levels = default_levels(dimensions)
    layout = ShardLayout(1024, tuple(levels), spec.precision)
    manifest = Manifest(
        generation=1,
        made_by="build",
        complete=False,
        task=task_entry(builder.task, fits[-1].reference, good),
        checkpoints=_entries(builder, runs),
        basis=BasisEntry(
            kind=spec.kind,
            dimensions=dimensions,
            requested=spec.dimensions,
            seed=spec.seed,
            fitted_rows=rows,
            files=[fit.basis for fit in fits],
        ),
        curvature=[],
        fisher=_fisher(fits[-1].reference) if spec.kind == "spectral" else None,
        precision=spec.precision,
        column_scales=[file for fit in fits for file in fit.column_scales],
        levels=levels,
        rows=rows,
        representations=_representations(fits[-1].reference),
        shard_rows=max(1, min(_SHARD_ROWS, _SHARD_BYTES * 1024 // layout.bytes)),
        shards=[],
        libraries={
            "gradtrace": version("gradtrace"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    return save_pending(builder.directory, manifest.with_skipped(bad.found))


def _screened(builder: Builder, runs: Sequence[Sequence[Checkpoint]], rows: Sequence[int], bad: BadRows) -> Ids:
    """Those of some rows that are not bad at any checkpoint; models are tried on some of these."""
    screening = Screening(builder.task, builder.reader, rows, bad)
    checkpoints = [checkpoint for run in runs for checkpoint in run]
    for checkpoint in checkpoints:
        screening.by_losses(checkpoint, builder.device)
    builder.probe_on(np.array(screening.good))
    for checkpoint in checkpoints:
        screening.by_gradients(builder.model(checkpoint))
    builder.probe_on(np.array(screening.good))
    check_methods(builder.task, [builder.task.train[row] for row in screening.good[:2]])
    return np.array(screening.good)


def _fisher(model: GradientModel) -> FisherEntry:
    """With a warning where the curvature is not that of the labels that the model would give."""
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
    """Raises StoreError unless the bases of all runs have so many dimensions, which is returned."""
    found = {fit.dimensions for fit in fits}
    if found != {dimensions}:
        raise StoreError(
            f"the gradients of a training run have {min(found)} independent coordinates, those of another "
            f"{max(dimensions, *found)}: build with dimensions={min(dimensions, *found)}"
        )
    return dimensions


def _representations(model: GradientModel) -> RepresentationsEntry | None:
    found = model.representation
    return None if found is None else RepresentationsEntry(source=found.source, dimensions=found.dimensions)
