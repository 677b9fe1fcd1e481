"""Fitting a training run: its basis, and for int4 the scales of its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.checkpoints import Checkpoint
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import FisherEntry
from gradtrace.store.row_ids import Ids
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.build.fit import (
    FitSpec,
    RunFit,
    Samples,
    fit_basis,
    fit_coordinates,
    recorded_basis,
    rotated_basis,
    write_basis,
    write_column_scales,
)
from gradtrace_indexer.build.moments import MomentSums
from gradtrace_indexer.progress import progress_bar


class RunFitting:
    """Fits a training run at its checkpoints, the last one its reference, or takes its recording's basis.

    name: of the files that are written
    """

    def __init__(
        self, builder: Builder, checkpoints: Sequence[Checkpoint], name: str, spec: FitSpec, samples: Samples
    ) -> None:
        self._builder, self._checkpoints, self._name = builder, checkpoints, name
        self._spec, self._samples = spec, samples
        self._reference = builder.model(checkpoints[-1])

    def fit(self, rows: Ids, fisher: FisherEntry | None) -> RunFit:
        """rows: those that a Gauss-Newton basis is fitted to;  fisher: the manifest's

        Raises:
            StoreError: as `fit_basis`, or a full disk.
            RecordingError: as `recorded_basis`.
            LossError: a loss or gradient of the samples is NaN or infinite.
        """
        builder, spec = self._builder, self._spec
        if spec.kind == "sparse":
            return fit_coordinates(builder.directory, self._name, spec, self._reference, self._shown_models)
        basis = self.first_basis()
        if spec.kind != "gauss-newton":
            return self.finished(basis)
        assert fisher is not None  # the manifest has one
        with progress_bar("rotation", len(rows) * len(self._checkpoints), " rows", builder.progress) as bar:
            sums = MomentSums(builder, basis, rows, fisher)
            return self.rotated(basis, sums.at_checkpoints(self._models(), bar.update))

    def first_basis(self) -> Basis:
        """The basis; for "gauss-newton" the spectral one that is still to be rotated. Raises as `fit`."""
        builder = self._builder
        with self._samples.named_in_errors():
            if builder.recording is not None:
                return recorded_basis(builder.recording, self._reference, len(builder.task.train))
            return fit_basis(self._spec, self._reference, self._shown_models, self._samples)

    def rotated(self, basis: Basis, moments: Iterable[Tensor]) -> RunFit:
        """moments: of the rows, at each checkpoint"""
        return self.finished(rotated_basis(basis, self._spec.dimensions, moments))

    def finished(self, basis: Basis) -> RunFit:
        """Write the basis, and the scales of its columns."""
        directory, name, samples = self._builder.directory, self._name, self._samples
        scales = []
        if self._spec.precision == "int4":
            with samples.named_in_errors():
                scales = [write_column_scales(directory, name, basis, self._shown_models, samples)]
        return RunFit(self._reference, basis.dimensions, write_basis(directory, name, basis), scales)

    def _models(self) -> Iterator[GradientModel]:
        yield from map(self._builder.model, self._checkpoints[:-1])
        yield self._reference

    def _shown_models(self) -> Iterator[GradientModel]:
        count, shown = len(self._checkpoints), self._builder.progress
        yield from progress_bar("fit", count, shown=shown, items=self._models())
