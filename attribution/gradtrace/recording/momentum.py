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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import RecordingError

_NEGLIGIBLE = 1e-12  # a sigma that has decayed to this share no longer changes the weights
_SMALLEST_GROWTH = 2.0**-500  # total growth is renormalised below this; float64 ends at 2^-1074
_INITIAL_STEPS = 1024  # for which the history has room


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


class Push(NamedTuple):
    """What a step adds to (u, sigma) of a row that it uses, in units of the row's contribution c_t."""

    u: float
    sigma: float


class ReplayedSgd:
    """The products of the steps' matrices, from after any earlier step until now.

    A step costs O(number of steps whose sigma is not negligible yet), and three numbers of memory.
    """

    def __init__(self) -> None:
        # Columns, for each step t: the product G_t of the growths of steps 1 to t; the coefficient of u that has come
        # from the step's sigma since, divided by the latest G; the product of shrinks since the step.
        self._history: NDArray[np.float64] = np.zeros((_INITIAL_STEPS, 3))
        self._history[0] = 1, 0, 1
        self.steps = 0
        self._first_live = 0  # the first step whose sigma is not negligible
        self._ratio = 0.0  # r

    def advance(self, step: SgdStep) -> Push:
        """Take one step. The names are those of the equations at the top of this file."""
        direct, follows = (1.0, step.momentum) if step.nesterov else (0.0, 1.0)
        push = -step.rate * (direct + follows)
        leak = -step.rate * follows * step.momentum
        growth = 1 + step.weight_decay * push + leak * self._ratio
        ratio = (step.weight_decay + step.momentum * self._ratio) / growth
        total_growth = growth * self._history[self.steps, 0]
        live = self._history[self._first_live : self.steps + 1]
        live[:, 1] += leak * live[:, 2] / total_growth
        live[:, 2] *= step.momentum - ratio * leak
        self._first_live += int((live[:, 2] < _NEGLIGIBLE).sum())
        self._ratio = ratio
        self.steps += 1
        if self.steps == len(self._history):
            self._history = np.concatenate([self._history, np.zeros_like(self._history)])
        self._history[self.steps] = total_growth, 0, 1
        if abs(total_growth) < _SMALLEST_GROWTH:
            self._renormalise()
        return Push(push, 1 - ratio * push)

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

    def state(self) -> dict[str, object]:
        return {"history": torch.from_numpy(self._history[: self.steps + 1].copy()), "ratio": self._ratio}

    def restore(self, state: dict[str, object]) -> None:
        """Return to the given `state`."""
        history = state["history"]
        assert isinstance(history, torch.Tensor)
        self.steps, self._first_live = len(history) - 1, 0
        self._history = np.concatenate([history.numpy(), np.zeros((_INITIAL_STEPS, 3))])
        self._ratio = float(str(state["ratio"]))
