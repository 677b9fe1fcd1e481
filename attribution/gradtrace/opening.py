"""Opening an index: checking that it is whole and belongs to the task, and loading what it needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.basis import Basis, check_layers, load_bases
from gradtrace.checkpoints.indexed import directories_of_runs, indexed_checkpoint
from gradtrace.checkpoints.learning_rates import warn_of_guessed_sums
from gradtrace.contents import IndexContents
from gradtrace.data.guards import check_dataset
from gradtrace.devices import pick_device
from gradtrace.errors import CorruptIndexError
from gradtrace.fingerprint import check_probe_losses, check_task
from gradtrace.fitted.curvature import Curvature, load_curvature
from gradtrace.fitted.representer_head import load_refit
from gradtrace.fitted.trak_kernels import load_kernels
from gradtrace.index import Index
from gradtrace.models.examination import Examination
from gradtrace.models.gradient_model import GradientModel, open_models
from gradtrace.models.path_report import summary
from gradtrace.sharded.open_rows import rows_here, rows_in_shards
from gradtrace.sharded.opening import open_shards
from gradtrace.sparse.coordinates import WeightCoordinates, load_coordinates
from gradtrace.sparse.store import index_rows
from gradtrace.sparse.whitening import WeightCurvature, load_weight_curvature
from gradtrace.store.index_files import VerifiedFiles, check_files
from gradtrace.store.manifest import Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace.task import Task

_log = logging.getLogger(__name__)


def open_index(
    path: str | Path,
    task: Task,
    *,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    searcher: str | None = None,
    device: str = "auto",
    verify: bool = True,
    verified: VerifiedFiles | None = None,
    shards: int = 0,
    ray: str | None = None,
) -> Index:
    """Open an index for queries, after checking that it is whole and belongs to the task.

    Args:
        checkpoints: directory of the weights, if they were moved since the build; of several training runs, one each.
        searcher: "progressive" for exact answers from an index that has an approximate searcher; None: its own.
        verify: read every file and compare its checksum. False leaves the rows out, nearly all of the bytes: damaged
            rows then give wrong scores, and answers and the log say that they were not verified.
        verified: files that were read and right before, which are read again only if they were changed since; those
            that are read now are added.
        shards: divide the rows among this number of processes, which search them at the same time; 0: search here.
        ray: address of a Ray cluster whose actors these are, in place of processes of this machine; "local": of a
            cluster that is started here. Every machine has the index at this path.

    Raises:
        StoreError: no index, an unfinished one (IncompleteIndexError), damaged files (CorruptIndexError), or an index
            of another task, data set or checkpoint (MismatchError).
        CheckpointError: weights are missing or do not fit the model.
        ShardLostError: a shard's process ended while it was opened.
        MissingLibraryError: Ray is asked for, and not installed.
    """
    manifest = _whole_manifest(directory := Path(path), searcher, verify, verified)
    return _opened(directory, manifest, task, checkpoints, searcher, device, verified=verify, shards=shards, ray=ray)


def open_examined(path: str | Path, task: Task, examination: Examination | None, *, device: str = "auto") -> Index:
    """As `open_index`, right after a build by this process.

    examination: that of the build, on the rows of the index, which spares another; None: the task is examined.
    """
    manifest = _whole_manifest(directory := Path(path), None, True, None)
    return _opened(directory, manifest, task, None, None, device, verified=True, examination=examination)


def _opened(
    directory: Path,
    manifest: Manifest,
    task: Task,
    checkpoints: str | Path | Sequence[str | Path] | None,
    searcher: str | None,
    device: str,
    *,
    verified: bool,
    examination: Examination | None = None,
    shards: int = 0,
    ray: str | None = None,
) -> Index:
    where, sparse = torch.device(pick_device(device)), manifest.basis.is_sparse
    store = index_rows(directory, manifest)
    bases = [] if sparse else [basis.to(where) for basis in load_bases(directory, manifest)]
    coordinates = load_coordinates(directory, manifest) if sparse else []
    models = _models(directory, manifest, task, store.row_ids.live_ids(), checkpoints, where, examination)
    _check_layers(manifest, models, bases, coordinates)
    if shards or ray is not None:
        rows = rows_in_shards(directory, manifest, open_shards(directory, manifest, shards, ray))
    else:
        rows = rows_here(directory, manifest, store, searcher, where)
    contents = IndexContents(
        directory,
        manifest,
        task,
        models,
        bases,
        coordinates,
        _curvature(directory, manifest, bases, coordinates),
        rows.store,
        rows.searcher,
        load_kernels(directory, manifest, where),
        rows.representations,
        load_refit(directory, manifest),
        verified=verified,
        shards=rows.shards,
    )
    return Index(contents)


def _curvature(
    directory: Path, manifest: Manifest, bases: Sequence[Basis], coordinates: Sequence[WeightCoordinates]
) -> Sequence[Curvature | WeightCurvature]:
    if manifest.basis.is_sparse:
        return load_weight_curvature(directory, manifest, coordinates)
    return load_curvature(directory, manifest, bases)


def _check_layers(
    manifest: Manifest,
    models: Sequence[GradientModel],
    bases: Sequence[Basis],
    coordinates: Sequence[WeightCoordinates],
) -> None:
    """Raises MismatchError unless the layers of every model are those of its run's rows."""
    for entry, model in zip(manifest.checkpoints, models, strict=True):
        if manifest.basis.is_sparse:
            coordinates[entry.run].check(model.plan.layers)
        else:
            check_layers(bases[entry.run], model.plan.layers)


def _models(
    directory: Path,
    manifest: Manifest,
    task: Task,
    rows: NDArray[np.int64],
    checkpoints: str | Path | Sequence[str | Path] | None,
    device: torch.device,
    examination: Examination | None,
) -> list[GradientModel]:
    """Those of all checkpoints. Raises as `open_index` where task or weights are not those that were indexed.

    rows: present in the index
    """
    check_dataset(task, skip_unreadable=bool(manifest.skipped))
    check_task(task, manifest.task)
    moved = directories_of_runs(checkpoints, len(manifest.basis.files))
    weights = [indexed_checkpoint(directory, entry, moved[entry.run]) for entry in manifest.checkpoints]
    models = open_models(task, weights, device, rows, examination)
    last = models[manifest.last_checkpoint]
    check_probe_losses(task, last, manifest.task)
    warn_of_guessed_sums(manifest.checkpoints)
    _log.info("%s: %s", directory, summary(last))
    return models


def _whole_manifest(directory: Path, searcher: str | None, verify: bool, verified: VerifiedFiles | None) -> Manifest:
    """The manifest of an index whose files are all there.  Arguments and errors as those of `open_index`."""
    manifest = read_manifest(directory)
    if searcher == "progressive":  # then the file of another need not even be whole
        manifest = manifest.model_copy(update={"searcher": None})
    if not verify:
        _log.warning("%s is opened without comparing the checksums of its rows: damage would not show", directory)
    problems = check_files(directory, manifest, verify, verified)
    if problems:
        raise CorruptIndexError(
            f"{directory} is damaged: {'; '.join(problems)}. Restore the files, or remove and rebuild the index"
        )
    return manifest
