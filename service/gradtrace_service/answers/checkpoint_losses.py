"""The mean loss of the training rows at each checkpoint."""

from __future__ import annotations

import numpy as np

from gradtrace.contents import IndexContents
from gradtrace_service.answers.slices import Sliced


class CheckpointLosses(Sliced):
    """A file for each shard and checkpoint is read, so a checkpoint takes the place of a row.

    Attributes:
        means: float64 [checkpoints], NaN where not known yet.
    """

    def __init__(self, contents: IndexContents) -> None:
        super().__init__(len(contents.manifest.checkpoints))
        self._store = contents.store
        self.means = np.full(self.rows, np.nan)

    def compute(self, rows: range) -> None:
        live = self._store.row_ids.live()
        for checkpoint in rows:
            losses = self._store.columns(checkpoint)["loss"][live]
            if len(losses):
                self.means[checkpoint] = losses.mean(dtype=np.float64)
