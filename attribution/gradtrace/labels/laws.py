"""What a call of a loss function says of the labels: the outputs that it takes, and the law that it gives to labels.

A loss that is -log of a probability of the label has a law of labels, and with it the Gauss-Newton matrix of the
outputs, which is their Fisher information (Martens 2020, Section 9.2): E[s sT], s = d loss / d outputs at a label that
is drawn from that law. Each law here gives such square roots s for draws of its own, per unit of the loss's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Numbers = Callable[[Tensor], Tensor]  # int64 numbers [n], counted from 0 -> a random 64-bit integer for each


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers for the n elements of a call; the same for the same element, whatever it is computed with.

    integers: int64 [n].  classes: int64 [n], those to take instead of drawing;  None: draw
    """

    integers: Tensor
    classes: Tensor | None = None

    def signs(self) -> Tensor:
        """+1 and -1. float32 [n]"""
        return 1.0 - 2.0 * ((self.integers >> 63) & 1).float()

    def second_signs(self) -> Tensor:
        """Independent of `signs`. float32 [n]"""
        return 1.0 - 2.0 * ((self.integers >> 62) & 1).float()

    def uniforms(self) -> Tensor:
        """In [0, 1). float64 [n]"""
        return ((self.integers >> 11) & ((1 << 53) - 1)).double() / 2**53


class Law:
    """The law of the label of one element of a loss, given the outputs.

    name: as it is told to people
    one_draw_is_exact: whether the square of one draw's root is its expectation already, since roots differ in sign only
    """

    name: str
    one_draw_is_exact = True

    def roots(self, outputs: Tensor, draws: Draws) -> Tensor:
        """A square root of the Fisher information of `outputs`, times a draw. In their shape."""
        raise NotImplementedError

    def prediction(self, outputs: Tensor) -> Tensor:
        """int64 class or floating-point value of each element."""
        return outputs


@dataclass(frozen=True, slots=True)
class Independent(Law):
    """Each element has one output, of this Fisher information.

    second: take the second of each element's independent signs
    """

    name: str
    information: Callable[[Tensor], Tensor]
    second: bool = False
    threshold: float | None = None  # output above which a label is 1; None: labels are values

    def roots(self, outputs: Tensor, draws: Draws) -> Tensor:
        signs = draws.second_signs() if self.second else draws.signs()
        return signs.reshape(outputs.shape) * self.information(outputs).sqrt()

    def prediction(self, outputs: Tensor) -> Tensor:
        return outputs if self.threshold is None else (outputs > self.threshold).long()


@dataclass(frozen=True, slots=True)
class Categorical(Law):
    """Each element is one class of several. Logits f: E[(p - e_y)(p - e_y)T] = diag p - p pT. Log-probabilities, -e_y.

    dim: that of the classes in the outputs
    """

    dim: int
    normalized: bool  # outputs are log-probabilities
    name = "categorical"
    one_draw_is_exact = False

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.exp() if self.normalized else outputs.softmax(self.dim)

    def roots(self, outputs: Tensor, draws: Draws) -> Tensor:
        chances = self.probabilities(outputs)
        classes = self._drawn(chances, draws).long()
        start = torch.zeros_like(chances) if self.normalized else chances
        return start.scatter(self.dim, classes, start.gather(self.dim, classes) - 1)

    def _drawn(self, chances: Tensor, draws: Draws) -> Tensor:
        """int64, the shape of `chances` with one in place of the classes."""
        shape = list(chances.shape)
        shape[self.dim] = 1
        if draws.classes is not None:
            return draws.classes.reshape(shape)
        cumulative = chances.cumsum(self.dim)
        total = cumulative.narrow(self.dim, -1, 1)
        below = cumulative <= draws.uniforms().to(total.dtype).reshape(shape) * total
        return below.sum(self.dim, keepdim=True).clamp_max(chances.shape[self.dim] - 1)

    def prediction(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(self.dim, keepdim=True)


_SMALLEST_VARIANCE = 1e-7  # of a Bernoulli law whose probability is rounded to 0 or 1, in float32

BERNOULLI = Independent("Bernoulli", lambda f: f.sigmoid() * (-f).sigmoid(), threshold=0.0)
BERNOULLI_PROBABILITY = Independent(
    "Bernoulli", lambda p: 1 / (p * (1 - p)).clamp_min(_SMALLEST_VARIANCE), threshold=0.5
)
GAUSSIAN = Independent("Gaussian", lambda f: torch.full_like(f, 2.0))  # (f - y)^2
LAPLACE = Independent("Laplace", torch.ones_like)  # |f - y|, of scale 1
POISSON_LOG_RATE = Independent("Poisson", torch.exp)


def poisson_rate(eps: float) -> Law:
    return Independent("Poisson", lambda rate: 1 / (rate + eps))


def gaussian_mean(variance: Tensor) -> Law:
    return Independent("Gaussian with its variance", lambda f: 1 / variance)


def gaussian_variance(eps: float) -> Law:
    return Independent("Gaussian with its variance", lambda v: 0.5 / v.clamp_min(eps).square(), second=True)


def huber(delta: float) -> Law:
    """Law of exp(-huber_loss): its Fisher information is the probability of an error below delta, where the loss is
    quadratic: sqrt(2 pi) erf(delta / sqrt 2) of a total of that + 2 / delta exp(-delta^2 / 2)."""
    inside = math.sqrt(2 * math.pi) * math.erf(delta / math.sqrt(2))
    information = inside / (inside + 2 / delta * math.exp(-(delta**2) / 2))
    return Independent("Huber", lambda f: torch.full_like(f, information))


def smooth_l1(beta: float) -> Law:
    """As `huber`, of exp(-smooth_l1_loss), which is e^2 / (2 beta) for errors below beta."""
    if beta == 0:
        return LAPLACE
    inside = math.sqrt(2 * math.pi * beta) * math.erf(math.sqrt(beta / 2))
    information = inside / (inside + 2 * math.exp(-beta / 2)) / beta
    return Independent("Huber", lambda f: torch.full_like(f, information))
