"""HyDRA's recursion: the derivative of SGD's weights with respect to a row's weight in the loss, without Hessian terms.

Give each training row z a weight w_z in its batches' losses, and let c_t be its contribution to the gradient of step t.
Then u = d theta / d w_z and s = d v / d w_z, with the momentum buffer v, follow PyTorch's SGD:

    g = c_t + weight_decay u        (+ H_t u, which HyDRA's fast version leaves out)
    s <- momentum s + g
    u <- u - lr s                   (Nesterov: u - lr (g + momentum s))

(Chen et al. 2021, HyDRA; restated by Bae et al. 2024, Equation 35.) In a step that does not use the row (c_t = 0), the
same 2 x 2 matrix applies to every row's (u, s). A row therefore needs no work in such steps: the product of their
matrices is the same for all rows that were last used at the same step, and is applied when the row is used again.

Let r be the ratio s / u of the slow solution, which starts at (u, s) = (1, 0), and sigma = s - r u. With w the weight
decay, m the momentum, and the weights' update -lr (direct g + follows s) (Nesterov: direct = 1, follows = m; else 0
and 1), a step is the triangular matrix

    u     <- growth u + leak sigma      leak   = -lr follows m
    sigma <- shrink sigma               growth = 1 - lr (direct + follows) w + leak r
                                        r      <- (w + m r) / growth
                                        shrink = m - r leak, with the new r

sigma decays like momentum^t, so products of these matrices cannot overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import RecordingError

_NEGLIGIBLE = 1e-12  # a sigma that has decayed to this share no longer changes the weights
_SMALLEST_GROWTH = 2.0**-500  # total growth is renormalised below this; float64 ends at 2^-1074
_INITIAL_STEPS = 1024  # for which the history has room
_BLOCK = 1 << 24  # values that are written at a time


@dataclass(frozen=True, slots=True)
class SgdStep:
    """The settings of an optimizer step. rate: the learning rate"""

    rate: float
    momentum: float
    weight_decay: float
    nesterov: bool


def sgd_step(optimizer: torch.optim.Optimizer) -> SgdStep:
    """The settings of the optimizer's next step.

    Raises:
        RecordingError: the optimizer is not SGD, its parameter groups differ, or it uses dampening or maximize.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise RecordingError(
            f"{type(optimizer).__name__} cannot be recorded, torch.optim.SGD alone: for adaptive optimizers keep "
            "checkpoints with CheckpointRecorder(optimizer_state=True) and ask with `tracin-adam`"
        )
    fields = ("lr", "momentum", "weight_decay", "nesterov", "dampening", "maximize")
    settings = {tuple(float(group[field]) for field in fields) for group in optimizer.param_groups}
    rate, momentum, weight_decay, nesterov, dampening, maximize = next(iter(settings))
    if len(settings) > 1 or dampening or maximize:
        raise RecordingError(
            "the optimizer's parameter groups differ, or it uses dampening or maximize: only SGD with one learning "
            "rate, momentum and weight decay for all weights can be recorded"
        )
    return SgdStep(rate, momentum, weight_decay, bool(nesterov))


class ReplayedSgd:
    """The products of the steps' matrices, from after any earlier step until now.

    A step costs O(number of steps whose sigma is not negligible yet), and three numbers of memory.

    ratio: r after the latest step, by which (u, sigma) tell s = sigma + r u
    """

    def __init__(self) -> None:
        # Columns, for each step t: the product G_t of the growths of steps 1 to t; the coefficient of u that has come
        # from the step's sigma since, divided by the latest G; the product of shrinks since the step.
        self._history: NDArray[np.float64] = np.zeros((_INITIAL_STEPS, 3))
        self._history[0] = 1, 0, 1
        self.steps = 0
        self._first_live = 0  # the first step whose sigma is not negligible
        self.ratio = 0.0

    def advance(self, step: SgdStep) -> tuple[float, float]:
        """Take one step, by the equations at the top of this file.

        Returns what it adds to (u, sigma) of a row that it uses, in units of the row's contribution c_t.
        """
        direct, follows = (1.0, step.momentum) if step.nesterov else (0.0, 1.0)
        push = -step.rate * (direct + follows)
        leak = -step.rate * follows * step.momentum
        growth = 1 + step.weight_decay * push + leak * self.ratio
        ratio = (step.weight_decay + step.momentum * self.ratio) / growth
        total_growth = growth * self._history[self.steps, 0]
        live = self._history[self._first_live : self.steps + 1]
        live[:, 1] += leak * live[:, 2] / total_growth
        live[:, 2] *= step.momentum - ratio * leak
        self._first_live += int((live[:, 2] < _NEGLIGIBLE).sum())
        self.ratio = ratio
        self.steps += 1
        if self.steps == len(self._history):
            self._history = np.concatenate([self._history, np.zeros_like(self._history)])
        self._history[self.steps] = total_growth, 0, 1
        if abs(total_growth) < _SMALLEST_GROWTH:
            self._renormalise()
        return push, 1 - ratio * push

    def _renormalise(self) -> None:
        """Bring the total growth back to about 1. It is a product over all steps, of which only ratios are used.

        For steps long ago it may overflow, and their coefficients underflow: nothing of (u, sigma) is left since them.
        """
        with np.errstate(over="ignore", under="ignore"):
            self._history[: self.steps + 1, 0] /= _SMALLEST_GROWTH
            self._history[: self.steps + 1, 1] *= _SMALLEST_GROWTH

    def since(self, steps: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(kept, leaked, left), each [n]: (u, sigma) after these steps is now (kept u + leaked sigma, left sigma)."""
        growth, leaked, left = self._history[steps].T
        latest = self._history[self.steps, 0]
        return latest / growth, latest * leaked, left

    def state(self) -> dict[str, Any]:
        return {"history": torch.from_numpy(self._history[: self.steps + 1].copy()), "ratio": self.ratio}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the given `state`."""
        history = state["history"]
        self.steps, self._first_live = len(history) - 1, 0
        self._history = np.concatenate([history.numpy(), np.zeros((_INITIAL_STEPS, 3))])
        self.ratio = state["ratio"]


class HydraRows:
    """(u, sigma) of every row, in the coordinates of a basis, after the step that last used the row.

    A step costs O(batch x dimensions). u, and sigma if there is momentum, are memory-mapped float32 [rows, dimensions].
    """

    def __init__(self, directory: Path, rows: int, dimensions: int, momentum: bool) -> None:
        self._shape = (rows, dimensions)
        self._files = [directory / name for name in ("u.working", "sigma.working")[: 1 + momentum]]
        arrays = [np.memmap(file, np.float32, "w+", shape=self._shape) for file in self._files]
        self._u = torch.from_numpy(arrays[0])
        self._sigma = torch.from_numpy(arrays[1]) if momentum else None
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
        push_u, push_sigma = self._sgd.advance(step)
        if len(set(rows.tolist())) < len(rows):
            rows, row = rows.unique(return_inverse=True)
            contributions = contributions.new_zeros(len(rows), contributions.shape[1]).index_add_(0, row, contributions)
        u, sigma = self._current(rows)
        self._u.index_copy_(0, rows, u.add_(contributions, alpha=push_u))
        if self._sigma is not None and sigma is not None:
            self._sigma.index_copy_(0, rows, sigma.add_(contributions, alpha=push_sigma))
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
