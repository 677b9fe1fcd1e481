"""Add checkpoints to an index: only their columns are computed, the basis stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradtrace.basis import require_layers
from gradtrace.checkpoints import Checkpoint
from gradtrace.errors import CheckpointError
from gradtrace.fingerprint import task_entry
from gradtrace.guards import check_dataset
from gradtrace.index import Index
from gradtrace.manifest import Manifest
from gradtrace.row_ids import read_row_ids
from gradtrace.task import Task
from gradtrace_indexer.build import check_order
from gradtrace_indexer.builder import Builder, checkpoint_entries
from gradtrace_indexer.generations import save_pending, successor, updating
from gradtrace_indexer.searcher_build import refresh_searcher


def add_checkpoints(
    path: str | Path,
    task: Task,
    new_checkpoints: Sequence[Checkpoint],
    *,
    batch_size: int = 128,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Add checkpoints of the same training run, publish them as one generation, and open it.

    Those that the index has already are passed over, so the whole directory of a run may be given, again and again.
    What an interrupted call began is finished first.

    Args:
        new_checkpoints: in training order, later than those of the index.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, or (MismatchError) another task.
        CheckpointError: a new checkpoint is not later than the index's, has the name of one of these, or does not fit
            the model; nothing is written then.
        TaskError: a row's loss or gradient is not finite.
    """
    directory = Path(path)
    check_order(new_checkpoints)
    check_dataset(task)
    builder = Builder(task, directory, device, batch_size, progress)
    with updating(directory, "add checkpoints") as (current, pending):
        builder.check(current)
        if pending is not None:
            current = builder.finish(pending)
        new = _not_indexed(new_checkpoints, current)
        if new:
            builder.finish(_begun(builder, current, new))
    return refresh_searcher(directory, task, device=device, progress=progress)


def still_to_come(checkpoints: Sequence[Checkpoint], manifest: Manifest) -> list[Checkpoint]:
    """Without those that a selection left out: of steps before the index's last, and not in it."""
    known, last = {entry.name for entry in manifest.checkpoints}, manifest.checkpoints[-1].step
    return [checkpoint for checkpoint in checkpoints if checkpoint.name in known or checkpoint.step > last]


def _not_indexed(checkpoints: Sequence[Checkpoint], current: Manifest) -> list[Checkpoint]:
    indexed = {entry.name: entry for entry in current.checkpoints}
    new = [checkpoint for checkpoint in checkpoints if checkpoint.name not in indexed]
    for checkpoint in checkpoints:
        if checkpoint.name in indexed and checkpoint.sha256() != indexed[checkpoint.name].sha256:
            raise CheckpointError(
                f"{checkpoint.path} has the name of a checkpoint of the index, and other weights: give it its "
                "own name, or build another index if the run was started anew"
            )
    last = current.checkpoints[-1]
    if new and new[0].step <= last.step:
        raise CheckpointError(
            f"{new[0].path} is of step {new[0].step}; the index goes up to step {last.step} ({last.name}), and only "
            "later checkpoints can be added: leave it out, or build another index"
        )
    return new


def _begun(builder: Builder, current: Manifest, new: Sequence[Checkpoint]) -> Manifest:
    """Commit the next generation without the new columns, once the new weights are known to fit."""
    basis = builder.basis_of(current)
    for checkpoint in new:
        model = builder.model(checkpoint)
        require_layers(basis, model.plan.layers)
    manifest = successor(
        current,
        "add checkpoints",
        checkpoints=[*current.checkpoints, *checkpoint_entries(builder.directory, new, builder.task)],
        task=task_entry(builder.task, model, read_row_ids(builder.directory, current).live_ids()),
    )
    return save_pending(builder.directory, manifest)
