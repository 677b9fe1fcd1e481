"""HyDRA's rows: how the weights at the end of training move with each training row's weight in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradtrace.errors import RecordingError
from gradtrace.recording.momentum import Memory, SgdStep

_BLOCK = 1 << 24  # values that are finished at a time


class HydraRows:
    """(u, sigma) of every row in the coordinates of a basis, each as of the step that last used the row.

    A step costs O(batch x dimensions). The working arrays are memory-mapped, float32 [rows, dimensions]: u, and sigma
    where there is momentum.
    """

    def __init__(self, directory: Path, rows: int, dimensions: int, momentum: bool) -> None:
        self._shape = (rows, dimensions)
        self._files = [directory / name for name in ("u.working", "sigma.working")[: 1 + momentum]]
        self._u, *others = [_zeros(file, self._shape) for file in self._files]
        self._sigma = others[0] if momentum else None
        self._last = torch.zeros(rows, dtype=torch.int64)  # the step after which (u, sigma) are told
        self._memory = Memory()

    def add(self, rows: Tensor, parts: Tensor, step: SgdStep) -> None:
        """Take one step.

        rows: int64 [batch], rows may repeat; parts: [batch, dimensions], their parts of the step's gradient.

        Raises:
            RecordingError: the optimizer had no momentum at the beginning, and has some now.
        """
        if step.momentum and self._sigma is None:
            raise RecordingError("momentum rose from zero: begin the training with a momentum above it")
        push = self._memory.advance(step)
        if len(set(rows.tolist())) < len(rows):
            rows, place = rows.unique(return_inverse=True)
            parts = parts.new_zeros(len(rows), parts.shape[1]).index_add_(0, place, parts)
        u, sigma = self._present(rows)
        self._u.index_copy_(0, rows, u.add_(parts, alpha=push.u))
        if self._sigma is not None and sigma is not None:
            self._sigma.index_copy_(0, rows, sigma.add_(parts, alpha=push.sigma))
        self._last[rows] = self._memory.steps

    def _present(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(u, sigma) of some rows as they are by now."""
        factors = self._memory.since(self._last[rows].numpy())
        kept, leaked, left = (torch.from_numpy(factor).float()[:, None] for factor in factors)
        u = self._u.index_select(0, rows).mul_(kept)
        if self._sigma is None:
            return u, None
        sigma = self._sigma.index_select(0, rows)
        return u.addcmul_(leaked, sigma), sigma.mul_(left)

    def write(self, path: Path) -> None:
        """The finished rows, -u, so that positive scores are proponents; little-endian float32, no header."""
        rows, dimensions = self._shape
        step = max(1, _BLOCK // dimensions)
        with path.open("wb") as file:
            for start in range(0, rows, step):
                u, _ = self._present(torch.arange(start, min(start + step, rows)))
                file.write(u.neg_().numpy().astype("<f4").tobytes())

    def remove_files(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        return {"u": self._u, "sigma": self._sigma, "last": self._last, "memory": self._memory.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as when `state` was taken."""
        self._u.copy_(state["u"])
        if self._sigma is not None:
            self._sigma.copy_(state["sigma"])
        self._last.copy_(state["last"])
        self._memory.restore(state["memory"])


def _zeros(path: Path, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=shape))
