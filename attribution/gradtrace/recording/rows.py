"""HyDRA's rows: the derivative of the final weights with respect to each training row's weight in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradtrace.errors import RecordingError
from gradtrace.recording.momentum import ReplayedSgd, SgdStep

_BLOCK = 1 << 24  # values that are written at a time


class HydraRows:
    """(u, sigma) of every row, see `momentum`, in the coordinates of a basis, after the step that last used the row.

    A step costs O(batch x dimensions). u, and sigma if there is momentum, are memory-mapped float32 [rows, dimensions].
    """

    def __init__(self, directory: Path, rows: int, dimensions: int, momentum: bool) -> None:
        self._shape = (rows, dimensions)
        self._files = [directory / name for name in ("u.working", "sigma.working")[: 1 + momentum]]
        self._u, *others = [_zeros(file, self._shape) for file in self._files]
        self._sigma = others[0] if momentum else None
        self._last_step = torch.zeros(rows, dtype=torch.int64)  # the step after which (u, sigma) of each row are valid
        self._sgd = ReplayedSgd()

    def add(self, rows: Tensor, contributions: Tensor, step: SgdStep) -> None:
        """Take one step.

        rows: int64 [batch], which may repeat.  contributions: [batch, dimensions], to the gradient of the step

        Raises:
            RecordingError: the optimizer's momentum was zero at the first step and is not any more.
        """
        if step.momentum and self._sigma is None:
            raise RecordingError("momentum rose from zero: begin the training with a momentum above it")
        push = self._sgd.advance(step)
        if len(set(rows.tolist())) < len(rows):
            rows, row = rows.unique(return_inverse=True)
            contributions = contributions.new_zeros(len(rows), contributions.shape[1]).index_add_(0, row, contributions)
        u, sigma = self._current(rows)
        self._u.index_copy_(0, rows, u.add_(contributions, alpha=push.u))
        if self._sigma is not None and sigma is not None:
            self._sigma.index_copy_(0, rows, sigma.add_(contributions, alpha=push.sigma))
        self._last_step[rows] = self._sgd.steps

    def _current(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(u, sigma) of the given rows after the latest step. Each [n, dimensions]; sigma None without momentum."""
        factors = self._sgd.since(self._last_step[rows].numpy())
        kept, leaked, left = (torch.from_numpy(factor).float()[:, None] for factor in factors)
        u = self._u.index_select(0, rows).mul_(kept)
        if self._sigma is None:
            return u, None
        sigma = self._sigma.index_select(0, rows)
        return u.addcmul_(leaked, sigma), sigma.mul_(left)

    def write(self, path: Path) -> None:
        """Write the rows as -u, so that positive scores are proponents. Little-endian float32, without header."""
        rows, dimensions = self._shape
        step = max(1, _BLOCK // dimensions)
        with path.open("wb") as file:
            for start in range(0, rows, step):
                u, _ = self._current(torch.arange(start, min(start + step, rows)))
                file.write(u.neg_().numpy().astype("<f4").tobytes())

    def remove_files(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        return {"u": self._u, "sigma": self._sigma, "last": self._last_step, "memory": self._sgd.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the given `state`."""
        self._u.copy_(state["u"])
        if self._sigma is not None:
            self._sigma.copy_(state["sigma"])
        self._last_step.copy_(state["last"])
        self._sgd.restore(state["memory"])


def _zeros(path: Path, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=shape))
