"""Build an index: fit the basis once, then one shard after the other; each is committed before the next begins.

A build is a list of independent, idempotent shard tasks (checkpoint, stretch of rows), so a killed one resumes with
the first shard that the manifest does not name, to the same bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gradtrace.basis import Basis, load_basis
from gradtrace.checkpoints import Checkpoint
from gradtrace.devices import pick_device
from gradtrace.encoder import GradientModel
from gradtrace.errors import CheckpointError, StoreError
from gradtrace.fingerprint import check_probe_losses, check_task, task_entry
from gradtrace.guards import check_dataset
from gradtrace.index import Index, open_index
from gradtrace.manifest import (
    MANIFEST_NAME,
    BasisEntry,
    BasisKind,
    CheckpointEntry,
    Manifest,
    Precision,
    ShardEntry,
    read_manifest,
)
from gradtrace.precision import STORED_DTYPES
from gradtrace.shards import ShardLayout, default_levels
from gradtrace.task import Task
from gradtrace_indexer.files import sole_writer, write_file, write_manifest
from gradtrace_indexer.fit import Samples, fit_basis, write_basis, write_curvature
from gradtrace_indexer.searcher_build import check_searcher, set_searcher
from gradtrace_indexer.shard_rows import RowWorkers, write_rows
from gradtrace_indexer.shard_writer import ShardWriter

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 32_768
_MOST_WORKERS = 8  # copies of the model


def build_index(
    task: Task,
    checkpoints: Sequence[Checkpoint],
    path: str | Path,
    *,
    dimensions: int = 2048,
    basis: BasisKind = "spectral",
    precision: Precision = "float16",
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
        precision: of the stored rows.
        searcher: "progressive", "faiss:FACTORY" or "annoy:TREES", see `set_searcher`; None: the one that is there, or
            exact search.

    Raises:
        StoreError: another build lies at `path` or is running there, or the disk is full.
        TaskError, CheckpointError: see their subclasses; nothing is written before the task was checked.
    """
    directory = Path(path)
    if precision not in STORED_DTYPES or batch_size < 1:
        raise StoreError(
            f"precision must be one of {', '.join(STORED_DTYPES)}, not {precision!r}; batch_size at least 1, "
            f"not {batch_size}"
        )
    rows = check_dataset(task)
    steps = [checkpoint.step for checkpoint in checkpoints]
    if not checkpoints or len({checkpoint.name for checkpoint in checkpoints}) < len(checkpoints):
        raise CheckpointError("checkpoints must be given, each once, with distinct file names")
    if steps != sorted(set(steps)):
        raise CheckpointError(f"checkpoints must be given in training order; their steps are {steps}")
    if searcher is not None:
        check_searcher(searcher)
    builder = _Builder(task, checkpoints, directory, torch.device(pick_device(device)), batch_size, progress)
    with sole_writer(directory):
        manifest = builder.resumed(rows, basis, precision, dimensions, seed)
        if manifest is None:
            manifest = builder.begun(rows, basis, precision, dimensions, seed)
        if not manifest.complete:
            builder.write_shards(manifest)
    if searcher is not None:
        return set_searcher(directory, task, searcher, device=device, progress=progress)
    return open_index(directory, task, device=device)


class _Builder:
    """What every step of one build needs."""

    def __init__(
        self,
        task: Task,
        checkpoints: Sequence[Checkpoint],
        directory: Path,
        device: torch.device,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.task, self.checkpoints, self.directory, self.device = task, checkpoints, directory, device
        self.batch_size, self.progress = batch_size, progress
        self.probe = [task.train[row] for row in range(min(2, len(task.train)))]

    def model(self, checkpoint: Checkpoint) -> GradientModel:
        return GradientModel(self.task, checkpoint, self.device, self.probe)

    def workers(self, checkpoint: Checkpoint, basis: Basis) -> RowWorkers:
        count = min(_MOST_WORKERS, torch.get_num_threads()) if self.device.type == "cpu" else 1
        return RowWorkers([self.model(checkpoint) for _ in range(count)], basis)

    def models(self) -> Iterator[GradientModel]:
        return (
            self.model(checkpoint)
            for checkpoint in tqdm(self.checkpoints, "fit", disable=not self.progress, leave=False)
        )

    def resumed(self, rows: int, basis: BasisKind, precision: Precision, dimensions: int, seed: int) -> Manifest | None:
        """The manifest of an earlier build of the same thing; None where there is none.

        Raises:
            StoreError: of another thing: other arguments, or (MismatchError) another task.
        """
        if not (self.directory / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(self.directory)
        wanted = {
            "rows": rows,
            "basis": basis,
            "dimensions": dimensions,
            "precision": precision,
            "seed": seed,
            "checkpoints": self.checkpoint_entries(),
        }
        found = {
            "rows": manifest.rows,
            "basis": manifest.basis.kind,
            "dimensions": manifest.basis.requested,
            "precision": manifest.precision,
            "seed": manifest.basis.seed,
            "checkpoints": manifest.checkpoints,
        }
        differing = [key for key in wanted if wanted[key] != found[key]]
        if differing:
            raise StoreError(
                f"{self.directory} already holds another index (other {', '.join(differing)}): choose another "
                "directory, or remove this one first"
            )
        check_task(self.task, manifest.task)
        check_probe_losses(self.task, self.model(self.checkpoints[-1]), manifest.task)
        return manifest

    def checkpoint_entries(self) -> list[CheckpointEntry]:
        return [
            CheckpointEntry(
                name=checkpoint.name,
                file=os.path.relpath(checkpoint.path.parent.resolve(), self.directory.resolve())
                + f"/{checkpoint.name}",
                step=checkpoint.step,
                learning_rate=checkpoint.learning_rate,
                sha256=checkpoint.sha256(),
            )
            for checkpoint in self.checkpoints
        ]

    def begun(self, rows: int, kind: BasisKind, precision: Precision, dimensions: int, seed: int) -> Manifest:
        """Fit basis and curvature, and commit a manifest without shards."""
        reference = self.model(self.checkpoints[-1])
        samples = Samples(self.task, seed)
        with samples.named_in_errors():
            basis = fit_basis(kind, dimensions, seed, reference, self.models, samples)
        names = [checkpoint.name for checkpoint in self.checkpoints]
        curvature = write_curvature(self.directory, basis, names, self.models, samples) if kind == "spectral" else []
        levels = default_levels(basis.dimensions)
        layout = ShardLayout(1024, tuple(levels), precision)
        manifest = Manifest(
            generation=1,
            complete=False,
            task=task_entry(self.task, reference),
            checkpoints=self.checkpoint_entries(),
            basis=BasisEntry(
                kind=kind,
                dimensions=basis.dimensions,
                requested=dimensions,
                seed=seed,
                file=write_basis(self.directory, basis),
            ),
            curvature=curvature,
            precision=precision,
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
        return write_manifest(self.directory, manifest)

    def write_shards(self, manifest: Manifest) -> None:
        """Write every shard that the manifest does not name yet, in order, committing each."""
        entry = manifest.basis
        basis = load_basis(self.directory / entry.file.path, entry.kind, entry.dimensions, entry.seed).to(self.device)
        done = {(shard.checkpoint, shard.start) for shard in manifest.shards}
        starts = range(0, manifest.rows, manifest.shard_rows)
        written = sum(shard.stop - shard.start for shard in manifest.shards)
        total = manifest.rows * len(self.checkpoints)
        with tqdm(total=total, initial=written, unit=" rows", desc="index", disable=not self.progress) as bar:
            for number, checkpoint in enumerate(self.checkpoints):
                pending = [start for start in starts if (number, start) not in done]
                workers = self.workers(checkpoint, basis) if pending else None
                for start in pending:
                    assert workers is not None
                    shard = self.write_shard(manifest, workers, number, start, bar)
                    manifest = write_manifest(
                        self.directory, manifest.model_copy(update={"shards": [*manifest.shards, shard]})
                    )
        write_manifest(self.directory, manifest.model_copy(update={"complete": True}))

    def write_shard(
        self, manifest: Manifest, workers: RowWorkers, number: int, start: int, bar: tqdm[Any]
    ) -> ShardEntry:
        """The rows of one stretch at one checkpoint, in batches counted from its start."""
        stop = min(start + manifest.shard_rows, manifest.rows)
        name = f"{manifest.checkpoints[number].name}/{start:09d}"
        layout = ShardLayout(stop - start, tuple(manifest.levels), manifest.precision)
        with ShardWriter(self.directory, f"rows/{name}.rows", layout) as writer:
            columns = write_rows(self.task, workers, range(start, stop), self.batch_size, writer, bar.update)
            entry = writer.commit()
        return ShardEntry(
            checkpoint=number,
            start=start,
            stop=stop,
            rows=entry,
            columns=write_file(self.directory, f"columns/{name}.parquet", columns.parquet()),
        )
