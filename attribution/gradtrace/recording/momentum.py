"""What becomes of one step's push on the weights in the steps after it: SGD's recursion without its Hessian terms.

Give each training row z a weight w_z in its batches' losses, and let c_t be its part of the gradient of step t. Then
u = d theta / d w_z and s = d v / d w_z, with v the momentum buffer, follow PyTorch's SGD:

    g = c_t + weight_decay u        (+ H_t u, which HyDRA's fast version leaves out)
    s <- momentum s + g
    u <- u - lr s                   (Nesterov: u - lr (g + momentum s))

(Chen et al. 2021, HyDRA; restated by Bae et al. 2024, Equation 35.) The same 2 x 2 matrix moves every row's (u, s), so
a row needs no work in the steps that do not use it: what they would have done to it is a few numbers common to all rows
that were last used at the same step. With r the ratio s / u of the slow solution, which starts at (1, 0), and
sigma = s - r u, the matrix is triangular: u <- growth u + leak sigma, and sigma <- shrink sigma, which dies away like
momentum^t. Products of it over any stretch are therefore stable to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import RecordingError

_GONE = 1e-12  # the share of a sigma below which it moves no weight any more
_SMALLEST = 2.0**-500  # growth since the beginning, before it is counted anew; float64 ends at 2^-1074
_ROOM = 1024


@dataclass(frozen=True, slots=True)
class SgdStep:
    """The settings of one optimizer step."""

    rate: float
    momentum: float
    weight_decay: float
    nesterov: bool


def sgd_step(optimizer: torch.optim.Optimizer) -> SgdStep:
    """The settings of the optimizer's next step.

    Raises:
        RecordingError: it is not SGD, or its parameter groups differ, or it uses dampening or maximize.
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


class Push(NamedTuple):
    """What a step adds to (u, sigma) of its rows, times their parts of its gradient."""

    u: float
    sigma: float


class Memory:
    """How (u, sigma) as they were after any earlier step reach the present. O(1) numbers a step.

    Only the steps whose sigma has not died away are touched by the next one.
    """

    def __init__(self) -> None:
        # After each step: u's growth since the beginning; what has leaked from its sigma to u since, in units of the
        # present growth; what is left of its sigma.
        self._history: NDArray[np.float64] = np.zeros((_ROOM, 3))
        self._history[0] = 1, 0, 1
        self.steps = 0
        self._live = 0  # the first step whose sigma is not gone
        self._ratio = 0.0

    def advance(self, step: SgdStep) -> Push:
        """Take one step."""
        direct, follows = (1.0, step.momentum) if step.nesterov else (0.0, 1.0)  # the update is direct g + follows s
        push = -step.rate * (direct + follows)
        leak = -step.rate * follows * step.momentum
        growth = 1 + step.weight_decay * push + leak * self._ratio
        ratio = (step.weight_decay + step.momentum * self._ratio) / growth
        present = growth * self._history[self.steps, 0]
        live = self._history[self._live : self.steps + 1]
        live[:, 1] += leak * live[:, 2] / present
        live[:, 2] *= step.momentum - ratio * leak
        self._live += int((live[:, 2] < _GONE).sum())
        self._ratio = ratio
        self.steps += 1
        if self.steps == len(self._history):
            self._history = np.concatenate([self._history, np.zeros_like(self._history)])
        self._history[self.steps] = present, 0, 1
        if abs(present) < _SMALLEST:
            self._renormalise()
        return Push(push, 1 - ratio * push)

    def _renormalise(self) -> None:
        """Growth is a product over all steps, and only ratios of it count: keep the present one near 1.

        That of steps long ago then overflows, and what leaked since them underflows: nothing of them is left by now.
        """
        with np.errstate(over="ignore", under="ignore"):
            self._history[: self.steps + 1, 0] /= _SMALLEST
            self._history[: self.steps + 1, 1] *= _SMALLEST

    def since(self, steps: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(kept, leaked, left), each [n]: (u, sigma) after a step are by now (kept u + leaked sigma, left sigma)."""
        growth, leaked, left = self._history[steps].T
        present = self._history[self.steps, 0]
        return present / growth, present * leaked, left

    def state(self) -> dict[str, object]:
        return {"history": torch.from_numpy(self._history[: self.steps + 1].copy()), "ratio": self._ratio}

    def restore(self, state: dict[str, object]) -> None:
        """Be as when `state` was taken."""
        history = state["history"]
        assert isinstance(history, torch.Tensor)
        self.steps, self._live = len(history) - 1, 0
        self._history = np.concatenate([history.numpy(), np.zeros((_ROOM, 3))])
        self._ratio = float(str(state["ratio"]))
