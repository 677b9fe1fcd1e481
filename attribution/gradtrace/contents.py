"""What an open index consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradtrace.basis import Basis
from gradtrace.candidates import Searcher
from gradtrace.encoder import GradientModel
from gradtrace.manifest import Manifest
from gradtrace.store import RowStore
from gradtrace.task import Task


@dataclass(slots=True)
class IndexContents:
    """models: of every checkpoint, in the manifest's order;  basis: on their device"""

    directory: Path
    manifest: Manifest
    task: Task
    models: list[GradientModel]
    basis: Basis
    store: RowStore
    searcher: Searcher

    @property
    def last_model(self) -> GradientModel:
        """What the index says of a prediction is of this one."""
        return self.models[self.manifest.last_checkpoint]
