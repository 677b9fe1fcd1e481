"""What an open index consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.candidates import Searcher
from gradtrace.encoder import GradientModel
from gradtrace.manifest import Manifest
from gradtrace.store import RowStore
from gradtrace.task import Task


@dataclass(slots=True)
class IndexContents:
    """models: of every checkpoint, in the manifest's order;  bases: of every training run, on the models' device
    curvature: as `load_curvature` returns it
    """

    directory: Path
    manifest: Manifest
    task: Task
    models: list[GradientModel]
    bases: list[Basis]
    curvature: list[dict[str, Tensor]]
    store: RowStore
    searcher: Searcher

    def basis_of(self, checkpoint: int) -> Basis:
        """In whose coordinates the rows at a checkpoint are: those of its training run's weights."""
        return self.bases[self.manifest.checkpoints[checkpoint].run]

    @property
    def last_model(self) -> GradientModel:
        """What the index says of a prediction is of this one."""
        return self.models[self.manifest.last_checkpoint]
