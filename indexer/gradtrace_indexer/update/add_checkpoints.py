"""Add to an index: checkpoints of a training run, or a whole run. Only their columns are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradtrace.basis import require_layers
from gradtrace.checkpoints import Checkpoint
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CheckpointError
from gradtrace.fingerprint import task_entry
from gradtrace.index import Index
from gradtrace.store.manifest import CheckpointEntry, Manifest, Operation, by_run, read_manifest, weights_positions
from gradtrace.store.row_ids import read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build.build import check_dimensions, check_order
from gradtrace_indexer.build.builder import Builder, checkpoint_entries
from gradtrace_indexer.build.fit import FitSpec, Samples
from gradtrace_indexer.generations import save_pending, successor, updating
from gradtrace_indexer.searchers.build import refresh_searcher


def add_checkpoints(
    path: str | Path,
    task: Task,
    new_checkpoints: Sequence[Checkpoint],
    *,
    run: int | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Add checkpoints of a training run that the index has, publish them as one generation, and open it.

    Those that the index has already are passed over, so the whole directory of a run may be given, again and again.
    What an interrupted call began is finished first.

    Args:
        new_checkpoints: in training order, later than those of the run.
        run: number of the training run, from 0; None: the last one.
        num_workers: as in `build_index`.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, or (MismatchError) another task.
        CheckpointError: a new checkpoint is not later than the run's, has the name of one of these, or does not fit
            the model, or there is no such run; nothing is written then.
        TaskError: a row's loss or gradient is not finite.
    """
    directory = Path(path)
    check_order(new_checkpoints)
    check_dataset(task, skip_unreadable=bool(read_manifest(directory).skipped))
    builder = Builder(task, directory, device, batch_size, progress, None, num_workers)
    with _caught_up(builder, "add checkpoints") as current:
        new = _not_indexed(new_checkpoints, _entries_of(current, run))
        if new:
            builder.finish(_begun(builder, current, new, run_number(current, run)))
    return refresh_searcher(directory, task, device=device, progress=progress)


def add_run(
    path: str | Path,
    task: Task,
    checkpoints: Sequence[Checkpoint],
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Add another training run of the task (another seed), publish it as one generation, and open it: scores are means
    over the runs.

    The run gets a basis of its own, of the index's kind, dimensions and seed. A run that the index has already is
    passed over. What an interrupted call began is finished first.

    Args:
        checkpoints: in training order; the last one is the reference of the run's basis.
        num_workers: as in `build_index`.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, or (MismatchError) another task.
        CheckpointError: a checkpoint does not fit the model; nothing is written then.
        TaskError: a row's loss or gradient is not finite.
    """
    directory = Path(path)
    check_order(checkpoints)
    check_dataset(task, skip_unreadable=bool(read_manifest(directory).skipped))
    builder = Builder(task, directory, device, batch_size, progress, None, num_workers)
    with _caught_up(builder, "add run") as current:
        if checkpoints[-1].sha256() not in {entry.sha256 for entry in current.checkpoints}:
            builder.finish(_begun_run(builder, current, checkpoints))
    return refresh_searcher(directory, task, device=device, progress=progress)


@contextmanager
def _caught_up(builder: Builder, operation: Operation) -> Iterator[Manifest]:
    """Be the only writer of an index; gives its generation after what this operation left unfinished before."""
    with updating(builder.directory, operation) as (current, pending):
        builder.check(current)
        yield current if pending is None else builder.finish(pending)


def run_number(manifest: Manifest, run: int | None) -> int:
    """Which run is meant. Raises CheckpointError where the index has none of that number."""
    last = len(manifest.basis.files) - 1
    if run is None:
        return last
    if not 0 <= run <= last:
        raise CheckpointError(f"the index has no training run {run}; its runs are 0 to {last}")
    return run


def still_to_come(checkpoints: Sequence[Checkpoint], manifest: Manifest, run: int | None = None) -> list[Checkpoint]:
    """Without those that a selection left out: of steps before the run's last in the index, and not in it."""
    known = _entries_of(manifest, run)
    last = list(known.values())[-1].step
    return [checkpoint for checkpoint in checkpoints if checkpoint.name in known or checkpoint.step > last]


def _entries_of(manifest: Manifest, run: int | None) -> dict[str, CheckpointEntry]:
    """The run's checkpoints in training order, by the names of their files."""
    number = run_number(manifest, run)
    own = by_run(manifest.checkpoints, weights_positions(manifest.checkpoints))[number]
    entries = [manifest.checkpoints[position] for position in own]
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


def _begun(builder: Builder, current: Manifest, new: Sequence[Checkpoint], run: int) -> Manifest:
    """Commit the next generation without the new columns, once the new weights are known to fit."""
    basis = builder.bases_of(current)[run]
    for checkpoint in new:
        model = builder.model(checkpoint)
        require_layers(basis, model.plan.layers)
    changes: dict[str, object] = {
        "checkpoints": [*current.checkpoints, *checkpoint_entries(builder.directory, new, builder.task, run)]
    }
    if run == run_number(current, None):  # else the model that predictions are told of stays
        changes["task"] = task_entry(builder.task, model, read_row_ids(builder.directory, current).live_ids())
    manifest = successor(current, "add checkpoints", **changes)
    return save_pending(builder.directory, _without_old_representations(manifest))


def _begun_run(builder: Builder, current: Manifest, checkpoints: Sequence[Checkpoint]) -> Manifest:
    """Fit the run's basis, and commit the next generation without its columns."""
    live, basis, run = read_row_ids(builder.directory, current).live_ids(), current.basis, len(current.basis.files)
    for checkpoint in checkpoints[:-1]:  # the last one's model is made for the fit
        builder.model(checkpoint)
    spec = FitSpec(basis.kind, basis.requested, basis.seed, current.precision)
    samples = Samples(builder.task, basis.seed, basis.fitted_rows, live)
    fit = builder.fit(checkpoints, f"{run}.{current.generation + 1}", spec, samples)
    check_dimensions([fit], basis.dimensions)
    manifest = successor(
        current,
        "add run",
        checkpoints=[*current.checkpoints, *checkpoint_entries(builder.directory, checkpoints, builder.task, run)],
        basis=basis.model_copy(update={"files": [*basis.files, fit.basis]}),
        column_scales=[*current.column_scales, *fit.column_scales],
        task=task_entry(builder.task, fit.reference, live),
    )
    return save_pending(builder.directory, _without_old_representations(manifest))


def _without_old_representations(manifest: Manifest) -> Manifest:
    """Those of what was the last checkpoint count no longer."""
    shards = [
        shard if shard.checkpoint in manifest.represented else shard.model_copy(update={"representations": None})
        for shard in manifest.shards
    ]
    return manifest.model_copy(update={"shards": shards})
