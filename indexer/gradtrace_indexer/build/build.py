"""Build an index: fit the bases once, then compute the rows of every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args

from typing_extensions import Unpack

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.indexed import checkpoint_entries
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError, RecordingError, StoreError
from gradtrace.index import Index
from gradtrace.opening import open_examined, open_index
from gradtrace.recording import read_recording
from gradtrace.recording.files import ROWS_NAME
from gradtrace.sparse.defaults import DEFAULT_DIMENSIONS, RowsOption, default_rows
from gradtrace.store.manifest import (
    MANIFEST_NAME,
    BasisKind,
    CheckpointEntry,
    Manifest,
    Precision,
)
from gradtrace.store.manifest_file import read_manifest
from gradtrace.task import Task
from gradtrace.user_code import check_methods
from gradtrace_indexer.build.averages import with_averages
from gradtrace_indexer.build.begin import Runs, begin
from gradtrace_indexer.build.builder import Builder, PassOptions, WorkOptions
from gradtrace_indexer.build.completion import complete
from gradtrace_indexer.build.fit import FitSpec
from gradtrace_indexer.build.taking_part import run_shared
from gradtrace_indexer.generations import unfinished
from gradtrace_indexer.searchers import check_searcher, set_searcher
from gradtrace_indexer.writing.files import sole_writer

_LONGEST_NAME = 200  # bytes; file systems allow 255, and more follows in an index's file names


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
    **passes: Unpack[WorkOptions],
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
    The other arguments: see `FitSpec`, `WorkOptions` and, for `searcher`, `set_searcher` (None: as it is, or exact).

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
    if searcher is not None:
        check_searcher(searcher)
    directory = Path(path)
    run = partial(
        _built,
        directory=directory,
        checkpoints=checkpoints,
        spec=spec,
        searcher=searcher,
        average_segments=average_segments,
        recording=recording,
        skip_bad_rows=skip_bad_rows,
    )
    index = run_shared(task, directory, passes, run)
    return index or open_index(directory, task, device=passes.get("device", "auto"))


def _built(
    task: Task, passes: PassOptions, *, directory: Path, searcher: str | None, skip_bad_rows: bool, **options: Any
) -> Index:
    """As `build_index`, by the only writer of the index. options: those of `_build`"""
    builder = Builder(task, directory, skip_bad_rows=skip_bad_rows, **passes)
    _build(builder, **options)
    device = passes.get("device", "auto")
    if searcher is not None:
        return set_searcher(directory, task, searcher, device=device, progress=builder.progress)
    return open_examined(directory, task, builder.examination, device=device)


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
    builder: Builder,
    *,
    checkpoints: Sequence[Checkpoint] | Runs | str | Path,
    spec: FitSpec,
    average_segments: int | None,
    recording: str | Path | None,
) -> None:
    """Check everything, then begin or resume the build, and publish it."""
    task, directory, rows = builder.task, builder.directory, len(builder.task.train)
    if not builder.skip_bad_rows:  # else it is not known yet which rows can be read
        check_methods(task, [task.train[row] for row in range(min(2, rows))])
    runs = _by_run(load_checkpoints(checkpoints) if isinstance(checkpoints, str | Path) else checkpoints)
    recorded = builder.recording = None if recording is None else read_recording(recording)
    if recorded is not None:
        if len(runs) > 1:
            raise RecordingError("a recording is of one training run: give the checkpoints of that run alone")
        spec = FitSpec(recorded.basis.kind, recorded.entry.requested, recorded.entry.seed, spec.precision)
    with sole_writer(directory):
        if average_segments is not None:
            runs = [with_averages(directory, task, run, average_segments) for run in runs]
        manifest = _existing(builder, runs, rows, spec) or begin(builder, runs, _entries(builder, runs), spec)
        if not manifest.complete:
            complete(builder, manifest)


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
