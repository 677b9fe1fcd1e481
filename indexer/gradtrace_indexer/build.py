"""Build an index: fit the basis once, then compute the rows of every checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gradtrace.checkpoints import Checkpoint
from gradtrace.encoder import GradientModel
from gradtrace.errors import CheckpointError, StoreError
from gradtrace.fingerprint import task_entry
from gradtrace.guards import check_dataset
from gradtrace.index import Index, open_index
from gradtrace.manifest import MANIFEST_NAME, BasisEntry, BasisKind, Manifest, Precision, read_manifest
from gradtrace.precision import STORED_DTYPES
from gradtrace.shards import ShardLayout, default_levels
from gradtrace.task import Task
from gradtrace_indexer.builder import Builder, checkpoint_entries
from gradtrace_indexer.files import sole_writer
from gradtrace_indexer.fit import Samples, fit_basis, write_basis, write_column_scales
from gradtrace_indexer.generations import save_pending, unfinished
from gradtrace_indexer.searcher_build import check_searcher, set_searcher

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 32_768


def build_index(
    task: Task,
    checkpoints: Sequence[Checkpoint],
    path: str | Path,
    *,
    dimensions: int = 2048,
    basis: BasisKind = "spectral",
    precision: Precision = "int8",
    batch_size: int = 128,
    seed: int = 0,
    searcher: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Index:
    """Build the index of a task's training rows, or go on with an interrupted build; a finished one is just opened.

    Args:
        checkpoints: in training order; the last one is the reference of the basis.
        dimensions: columns kept for each checkpoint; at most the number of parameters.
        precision: of the stored rows, see docs/choosing.md.
        searcher: "progressive", "faiss:FACTORY" or "annoy:TREES", see `set_searcher`; None: the one that is there, or
            exact search.

    Raises:
        StoreError: another build lies at `path` or is running there, or the disk is full.
        TaskError, CheckpointError: see their subclasses; nothing is written before the task was checked.
    """
    directory = Path(path)
    if precision not in STORED_DTYPES:
        raise StoreError(f"precision must be one of {', '.join(STORED_DTYPES)}, not {precision!r}")
    rows = check_dataset(task)
    check_order(checkpoints)
    if searcher is not None:
        check_searcher(searcher)
    builder = Builder(task, directory, device, batch_size, progress)
    with sole_writer(directory):
        wanted = {
            "rows": rows,
            "basis": basis,
            "dimensions": dimensions,
            "precision": precision,
            "seed": seed,
            "checkpoints": checkpoint_entries(directory, checkpoints, task),
        }
        manifest = _found(builder, wanted)
        if manifest is None:
            manifest = _begun(builder, checkpoints, rows, basis, precision, dimensions, seed)
        if not manifest.complete:
            builder.finish(manifest)
    if searcher is not None:
        return set_searcher(directory, task, searcher, device=device, progress=progress)
    return open_index(directory, task, device=device)


def check_order(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointError if there are none, or not in training order, or not with names of their own."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    if not checkpoints or len({checkpoint.name for checkpoint in checkpoints}) < len(checkpoints):
        raise CheckpointError("checkpoints must be given, each once, with distinct file names")
    if steps != sorted(set(steps)):
        raise CheckpointError(f"checkpoints must be given in training order; their steps are {steps}")


def _found(builder: Builder, wanted: Mapping[str, object]) -> Manifest | None:
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
    found = {
        "rows": manifest.task.train_rows,
        "basis": manifest.basis.kind,
        "dimensions": manifest.basis.requested,
        "precision": manifest.precision,
        "seed": manifest.basis.seed,
        "checkpoints": manifest.checkpoints,
    }
    differing = [key for key in wanted if wanted[key] != found[key]]
    if differing:
        raise StoreError(
            f"{directory} already holds another index (other {', '.join(differing)}): choose another directory, remove "
            "this one first, or bring it up to date with `gradtrace update` (checkpoints) or `gradtrace append` (rows)"
        )
    builder.check(manifest)
    return manifest


def _begun(
    builder: Builder,
    checkpoints: Sequence[Checkpoint],
    rows: int,
    kind: BasisKind,
    precision: Precision,
    dimensions: int,
    seed: int,
) -> Manifest:
    """Fit the basis, and commit a manifest without rows."""
    reference = builder.model(checkpoints[-1])
    samples = Samples(builder.task, seed, rows)

    def models() -> Iterator[GradientModel]:
        return map(builder.model, tqdm(checkpoints, "fit", disable=not builder.progress, leave=False))

    with samples.named_in_errors():
        basis = fit_basis(kind, dimensions, seed, reference, models, samples)
        scales = write_column_scales(builder.directory, basis, models, samples) if precision == "int4" else None
    levels = default_levels(basis.dimensions)
    layout = ShardLayout(1024, tuple(levels), precision)
    manifest = Manifest(
        generation=1,
        made_by="build",
        complete=False,
        task=task_entry(builder.task, reference, np.arange(rows)),
        checkpoints=checkpoint_entries(builder.directory, checkpoints, builder.task),
        basis=BasisEntry(
            kind=kind,
            dimensions=basis.dimensions,
            requested=dimensions,
            seed=seed,
            fitted_rows=rows,
            file=write_basis(builder.directory, basis),
        ),
        curvature=[],
        precision=precision,
        column_scales=scales,
        levels=levels,
        rows=rows,
        shard_rows=max(1, min(_SHARD_ROWS, _SHARD_BYTES * 1024 // layout.bytes)),
        shards=[],
        libraries={
            "gradtrace": version("gradtrace"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    return save_pending(builder.directory, manifest)
