"""Fit what an index keeps for life: its basis, and each checkpoint's curvature in the basis's coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.basis import Basis, check_layers, dense_basis, identity_basis, two_sided_basis
from gradtrace.data.dataset import fetch
from gradtrace.errors import LossError, RecordingError, StoreError
from gradtrace.fitted.ekfac import fit_spectral_basis
from gradtrace.fitted.fisher_batches import fisher_batches
from gradtrace.fitted.gauss_newton import check_rotation, coordinates_before, rotation
from gradtrace.models.gradient_model import GradientModel
from gradtrace.recording import Recording
from gradtrace.recording.influence_recorder import weights_sha256
from gradtrace.sparse.coordinates import WeightCoordinates
from gradtrace.store.manifest import BasisKind, FileEntry, Precision
from gradtrace.store.precision import STORED_DTYPES, column_scales
from gradtrace.task import Example, Task
from gradtrace.tasks.language import LanguageTask, batch_size
from gradtrace_indexer.writing.files import write_file

_SAMPLE_ROWS = 2048
_SAMPLE_BATCH = 128

Models = Callable[[], Iterator[GradientModel]]  # one for each checkpoint, in order, loaded one at a time


def sample_rows(seed: int, rows: int) -> NDArray[np.int64]:
    """The numbers of randomly drawn rows among the first `rows`, ascending."""
    return np.sort(np.random.default_rng(seed).choice(rows, size=min(rows, _SAMPLE_ROWS), replace=False))


class Samples:
    """Examples of the rows that `sample_rows` draws, in batches; the same whenever they are drawn again, except that
    deleted rows are left out. Remembers the rows of the last batch that it gave.

    live: int64, ascending, the rows that are not deleted;  None: all
    """

    def __init__(self, task: Task, seed: int, rows: int, live: NDArray[np.int64] | None = None) -> None:
        chosen = sample_rows(seed, rows)
        if live is not None:
            chosen_live = np.intersect1d(chosen, live)
            chosen = chosen_live if len(chosen_live) else live[:_SAMPLE_ROWS]
        batches = np.array_split(chosen, -(-len(chosen) // _sample_batch(task)))
        self._rows: list[list[int]] = [batch.tolist() for batch in batches]
        self._examples = [fetch(task.train, batch) for batch in self._rows]
        self._last = self._rows[0]

    def __iter__(self) -> Iterator[list[Example]]:
        for rows, examples in zip(self._rows, self._examples, strict=True):
            self._last = rows
            yield examples

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Losses of these examples that are NaN or infinite are reported with the numbers of their rows."""
        try:
            yield
        except LossError as error:
            raise error.naming(self._last) from error


def _sample_batch(task: Task) -> int:
    """Examples in a batch. It does not follow the build's batches, on which the labels that are drawn would depend."""
    return min(batch_size(task), _SAMPLE_BATCH) if isinstance(task, LanguageTask) else _SAMPLE_BATCH


@dataclass(frozen=True)
class FitSpec:
    """How gradients are compressed, the same for all training runs of an index.

    kind: of the basis; "sparse": none, each row has coordinates of its own.
    dimensions: columns kept for each checkpoint; there are no more than parameters.
    seed: of sampled rows, labels and projections.
    precision: of the stored rows, see docs/choosing.md.

    Raises:
        StoreError: an unknown precision.
    """

    kind: BasisKind
    dimensions: int
    seed: int
    precision: Precision

    def __post_init__(self) -> None:
        if self.precision not in STORED_DTYPES:
            raise StoreError(f"precision must be one of {', '.join(STORED_DTYPES)}, not {self.precision!r}")
        if self.kind == "sparse" and self.precision != "int8":
            raise StoreError(f"sparse rows are stored as int8: leave precision {self.precision!r} out")
        if self.kind == "sparse" and self.dimensions < 1:
            raise StoreError(f"dimensions must be at least 1, not {self.dimensions}")


@dataclass(frozen=True)
class RunFit:
    """What was fitted to a training run; `reference` is its last checkpoint's model."""

    reference: GradientModel
    dimensions: int
    basis: FileEntry
    column_scales: list[FileEntry]  # one for int4, else none


def fit_basis(spec: FitSpec, reference: GradientModel, models: Models, samples: Samples) -> Basis:
    """The basis of this kind; fewer dimensions if the model has fewer parameters. Of a Gauss-Newton basis, the
    spectral one whose coordinates are still to be rotated.

    Raises:
        StoreError: an unknown kind, no dimensions, or too many for a Gauss-Newton basis.
    """
    layers, kind, seed = reference.plan.layers, spec.kind, spec.seed
    if spec.dimensions < 1:
        raise StoreError(f"dimensions must be at least 1, not {spec.dimensions}")
    parameters = sum(layer.size for layer in layers)
    dimensions = min(spec.dimensions, parameters)
    if kind == "gauss-newton":
        dimensions = min(coordinates_before(spec.dimensions), parameters)
        check_rotation(dimensions)
    if kind in ("gauss-newton", "spectral"):
        return fit_spectral_basis(
            models,
            reference,
            lambda: (reference.batch(examples) for examples in islice(samples, 0, None, 2)),  # half is enough here
            lambda model: fisher_batches(model, samples, seed),
            dimensions,
            seed,
        )
    if kind == "two-sided":
        if dimensions < len(layers):
            raise StoreError(
                f"two-sided: dimensions must be at least {len(layers)}, one for each layer, not {dimensions}"
            )
        return two_sided_basis(layers, dimensions, seed)
    if kind in ("gaussian", "rademacher"):
        return dense_basis(layers, kind, dimensions, seed)
    if kind == "none":
        return identity_basis(layers, seed)
    raise StoreError(f"unknown basis {kind!r}; choose gauss-newton, spectral, two-sided, gaussian, rademacher or none")


def fit_coordinates(directory: Path, name: str, spec: FitSpec, reference: GradientModel, models: Models) -> RunFit:
    """What a training run's sparse rows need: the weights that their coordinates are. The model of every checkpoint is
    made, to see whether it fits."""
    coordinates = WeightCoordinates.of(reference.plan.layers)
    for model in models():
        coordinates.check(model.plan.layers)
    file = write_file(directory, f"bases/{name}.safetensors", safetensors.torch.save(coordinates.tensors()))
    return RunFit(reference, min(spec.dimensions, coordinates.count), file, [])


def rotated_basis(spectral: Basis, dimensions: int, moments: Iterable[Tensor]) -> Basis:
    """The Gauss-Newton basis. moments: as `fitted.gauss_newton.rotation` takes them, in the spectral coordinates"""
    dimensions = min(dimensions, spectral.dimensions)
    return replace(spectral, kind="gauss-newton", dimensions=dimensions, rotation=rotation(moments, dimensions))


def recorded_basis(recording: Recording, reference: GradientModel, rows: int) -> Basis:
    """Raises RecordingError if the recording is not of the training that ended with the reference's weights."""
    if recording.entry.rows != rows or recording.entry.weights_sha256 != weights_sha256(reference.model):
        raise RecordingError(
            f"{recording.directory} records a training on {recording.entry.rows} rows that ended, after "
            f"{recording.entry.steps} steps, with other weights than those of the last checkpoint, or on other than "
            f"{rows} rows: save a checkpoint after the last recorded step, and give checkpoints up to it"
        )
    check_layers(recording.basis, reference.plan.layers)
    return recording.basis


def write_basis(directory: Path, name: str, basis: Basis, folder: str = "bases") -> FileEntry:
    return write_file(directory, f"{folder}/{name}.safetensors", safetensors.torch.save(basis.tensors()))


def write_column_scales(directory: Path, name: str, basis: Basis, models: Models, samples: Samples) -> FileEntry:
    """What int4 divides each column by, from the gradients of half the samples at every checkpoint."""
    squares, rows = torch.zeros(basis.dimensions, dtype=torch.float64), 0
    for model in models():
        projection = basis.to(model.device)
        for examples in islice(samples, 0, None, 2):
            coordinates = model.encode(projection, model.batch(examples))[0]
            squares += coordinates.double().square().sum(0).cpu()
            rows += len(coordinates)
    content = safetensors.torch.save({"column_scales": column_scales(squares / rows, rows)})
    return write_file(directory, f"column_scales/{name}.safetensors", content)


def write_curvature(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
    return write_file(directory, f"curvature/{name}.safetensors", safetensors.torch.save(dict(tensors)))
