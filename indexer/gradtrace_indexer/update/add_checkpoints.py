"""Add to an index: checkpoints of a training run, or a whole run. Only their columns are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from typing_extensions import Unpack

from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.indexed import checkpoint_entries
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.store.manifest import CheckpointEntry, Manifest, Operation, by_run, weights_positions
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build.begin import check_dimensions
from gradtrace_indexer.build.build import check_order
from gradtrace_indexer.build.builder import Builder, PassOptions, WorkOptions
from gradtrace_indexer.build.completion import complete
from gradtrace_indexer.build.fit import FitSpec, Samples
from gradtrace_indexer.build.run_fit import RunFitting
from gradtrace_indexer.build.taking_part import Run, run_shared
from gradtrace_indexer.generations import save_pending, successor, updating
from gradtrace_indexer.searchers import refresh_searcher


def add_checkpoints(
    path: str | Path,
    task: Task,
    new_checkpoints: Sequence[Checkpoint],
    *,
    run: int | None = None,
    **passes: Unpack[WorkOptions],
) -> Index:
    """Add checkpoints of a training run that the index has, publish them as one generation, and open it.

    Those that the index has are left out, so the whole directory of a run may be given again and again.
    What an interrupted call began is finished first.

    Args:
        new_checkpoints: in training order, later than those of the run.
        run: number of the training run, from 0; None: the last one.
        passes: see `WorkOptions`.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, or (MismatchError) another task.
        CheckpointError: a new checkpoint is not later than the run's, has the name of one of these, or does not fit
            the model, or there is no such run; nothing is written then.
        TaskError: a row's loss or gradient is not finite.
    """
    check_order(new_checkpoints)
    return _run(path, task, passes, partial(add_alone, directory=Path(path), checkpoints=new_checkpoints, run=run))


def _run(path: str | Path, task: Task, passes: WorkOptions, run: Run[Index]) -> Index:
    check_dataset(task, skip_unreadable=bool(read_manifest(Path(path)).skipped))
    return run_shared(task, Path(path), passes, run) or open_index(path, task, device=passes.get("device", "auto"))


def add_alone(
    task: Task, passes: PassOptions, *, directory: Path, checkpoints: Sequence[Checkpoint], run: int | None
) -> Index:
    with _updated(directory, task, "add checkpoints", passes) as (builder, current):
        new = _not_indexed(checkpoints, _entries_of(current, run))
        if new:
            complete(builder, _begin(builder, current, new, run_number(current, run)))
    return refresh_searcher(directory, task, device=passes.get("device", "auto"), progress=builder.progress)


def add_run(path: str | Path, task: Task, checkpoints: Sequence[Checkpoint], **passes: Unpack[WorkOptions]) -> Index:
    """Add another training run of the task (another seed), publish it as one generation, and open it: scores are means
    over the runs.

    The run gets a basis of its own, of the index's kind, dimensions and seed. A run that the index has stays as it is.
    What an interrupted call began is finished first.

    Args:
        checkpoints: in training order; the last one is the reference of the run's basis.
        passes: see `WorkOptions`.

    Raises as `add_checkpoints`, but that a run's checkpoints may be of any step, and have any names.
    """
    check_order(checkpoints)
    return _run(path, task, passes, partial(_added_run, directory=Path(path), checkpoints=checkpoints))


def _added_run(task: Task, passes: PassOptions, *, directory: Path, checkpoints: Sequence[Checkpoint]) -> Index:
    with _updated(directory, task, "add run", passes) as (builder, current):
        if checkpoints[-1].sha256() not in {entry.sha256 for entry in current.checkpoints}:
            complete(builder, _begin_run(builder, current, checkpoints))
    return refresh_searcher(directory, task, device=passes.get("device", "auto"), progress=builder.progress)


@contextmanager
def _updated(
    directory: Path, task: Task, operation: Operation, passes: PassOptions
) -> Iterator[tuple[Builder, Manifest]]:
    """Be the only writer of an index; gives its current generation, after finishing what this operation left undone."""
    builder = Builder(task, directory, **passes)
    with updating(directory, operation) as (current, pending):
        builder.check(current)
        yield builder, current if pending is None else complete(builder, pending)


def run_number(manifest: Manifest, run: int | None) -> int:
    """The run's number; None stands for the last. Raises CheckpointError where the index has no such run."""
    last = len(manifest.basis.files) - 1
    if run is None:
        return last
    if not 0 <= run <= last:
        raise CheckpointError(f"the index has no training run {run}; its runs are 0 to {last}")
    return run


def still_to_come(checkpoints: Sequence[Checkpoint], manifest: Manifest, run: int | None = None) -> list[Checkpoint]:
    """The checkpoints that the run's index has or could get: a selection may have left out some of the earlier ones."""
    indexed = _entries_of(manifest, run)
    last = list(indexed.values())[-1].step
    return [checkpoint for checkpoint in checkpoints if checkpoint.name in indexed or checkpoint.step > last]


def _entries_of(manifest: Manifest, run: int | None) -> dict[str, CheckpointEntry]:
    """The run's checkpoints in training order, by the names of their files."""
    number = run_number(manifest, run)
    positions = by_run(manifest.checkpoints, weights_positions(manifest.checkpoints))[number]
    entries = [manifest.checkpoints[position] for position in positions]
    return {Path(entry.file).name: entry for entry in entries}


def _not_indexed(checkpoints: Sequence[Checkpoint], indexed: dict[str, CheckpointEntry]) -> list[Checkpoint]:
    new = [checkpoint for checkpoint in checkpoints if checkpoint.name not in indexed]
    for checkpoint in checkpoints:
        if checkpoint.name in indexed and checkpoint.sha256() != indexed[checkpoint.name].sha256:
            raise CheckpointError(
                f"{checkpoint.path} has the name of a checkpoint of the index, and other weights: give it its own name "
                "if it is of the same training, or add another training as a run of its own (add_run, --new-run)"
            )
    last = list(indexed.values())[-1]
    if new and new[0].step <= last.step:
        raise CheckpointError(
            f"{new[0].path} is of step {new[0].step}; the index goes up to step {last.step} ({last.name}), and only "
            "later checkpoints can be added: leave it out, or build another index"
        )
    return new


def _begin(builder: Builder, current: Manifest, new: Sequence[Checkpoint], run: int) -> Manifest:
    """Commit the next generation without the new columns, once the new weights are known to fit."""
    for checkpoint in new:
        model = builder.model(checkpoint)
        builder.check_layers(current, run, model)
    changes: dict[str, object] = {
        "checkpoints": [*current.checkpoints, *checkpoint_entries(builder.directory, new, builder.task, run)]
    }
    if run == run_number(current, None):  # else predictions are still those of another run's model
        changes["task"] = task_entry(builder.task, model, read_row_ids(builder.directory, current).live_ids())
    manifest = successor(current, "add checkpoints", **changes)
    return save_pending(builder.directory, manifest)


def _begin_run(builder: Builder, current: Manifest, checkpoints: Sequence[Checkpoint]) -> Manifest:
    """Fit the run's basis, and commit the next generation without its columns."""
    live, basis, run = read_row_ids(builder.directory, current).live_ids(), current.basis, len(current.basis.files)
    if not basis.has_curvature:  # its fit makes every checkpoint's model; else see here that each fits
        for checkpoint in checkpoints[:-1]:
            builder.model(checkpoint)
    spec = FitSpec(basis.kind, basis.requested, basis.seed, current.precision)
    samples = Samples(builder.task, basis.seed, basis.fitted_rows, live)
    fitting = RunFitting(builder, checkpoints, f"{run}.{current.generation + 1}", spec, samples)
    fit = fitting.fit(live[live < basis.fitted_rows], current.fisher)
    check_dimensions([fit], basis.dimensions)
    manifest = successor(
        current,
        "add run",
        checkpoints=[*current.checkpoints, *checkpoint_entries(builder.directory, checkpoints, builder.task, run)],
        basis=basis.model_copy(update={"files": [*basis.files, fit.basis]}),
        column_scales=[*current.column_scales, *fit.column_scales],
        task=task_entry(builder.task, fit.reference, live),
    )
    return save_pending(builder.directory, manifest)
