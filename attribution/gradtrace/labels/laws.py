"""Laws of the label that loss functions imply, and draws whose gradients have the law's Fisher information.

A loss that is -log of a probability of the label implies a law of the label. The Gauss-Newton matrix of the outputs is
then their Fisher information (Martens 2020, section 9.2): E[s sT], with s = d loss / d outputs at a label that is drawn
from the law. The roots of a law are such vectors s: for a loss of weight 1, E[s sT] is the Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers for the n elements of a loss call. An element has the same ones in every batch.

    integers: int64 [n], random
    classes: int64 [n], the classes to use instead of drawn ones;  None: draw them
    """

    integers: Tensor
    classes: Tensor | None = None

    def signs(self, second: bool = False) -> Tensor:
        """+1 and -1; the second signs are independent of the first. float32 [n]"""
        return 1.0 - 2.0 * ((self.integers >> (62 if second else 63)) & 1).float()

    def uniforms(self) -> Tensor:
        """In [0, 1). float64 [n]"""
        return ((self.integers >> 11) & ((1 << 53) - 1)).double() / 2**53


@dataclass(frozen=True, slots=True)
class Independent:
    """Each element has one output f, of Fisher information I(f): s = +-sqrt(I(f)), so one draw gives E[s sT] exactly.

    name: as shown to users
    information: I, elementwise
    second: use the second of each element's independent signs
    threshold: output above which the predicted class is 1; None: labels are values
    """

    name: str
    information: Callable[[Tensor], Tensor]
    second: bool = False
    threshold: float | None = None

    def roots(self, outputs: Tensor, draws: Draws) -> Tensor:
        """s, one for each draw, in the shape of `outputs`."""
        return draws.signs(self.second).reshape(outputs.shape) * self.information(outputs).sqrt()

    def prediction(self, outputs: Tensor) -> Tensor:
        """Value, or int64 class, of each element."""
        return outputs if self.threshold is None else (outputs > self.threshold).long()


@dataclass(frozen=True, slots=True)
class Categorical:
    """Each element is a class y of several, of probabilities p.

    Outputs are logits f: s = p - e_y, and E[s sT] = diag(p) - p pT; or log-probabilities: s = -e_y, E[s sT] = diag(p).

    dim: dimension of the classes in the outputs
    normalized: outputs are log-probabilities
    """

    dim: int
    normalized: bool
    name = "categorical"

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.exp() if self.normalized else outputs.softmax(self.dim)

    def roots(self, outputs: Tensor, draws: Draws) -> Tensor:
        """s, one for each draw, in the shape of `outputs`."""
        probabilities = self.probabilities(outputs)
        classes = self._classes(probabilities, draws).long()
        mean = torch.zeros_like(probabilities) if self.normalized else probabilities
        return mean.scatter(self.dim, classes, mean.gather(self.dim, classes) - 1)

    def _classes(self, probabilities: Tensor, draws: Draws) -> Tensor:
        """Drawn (by inverting the distribution function) or prescribed classes: int64, of length 1 in `dim`."""
        shape = list(probabilities.shape)
        shape[self.dim] = 1
        if draws.classes is not None:
            return draws.classes.reshape(shape)
        cumulative = probabilities.cumsum(self.dim)
        total = cumulative.narrow(self.dim, -1, 1)
        below = cumulative <= draws.uniforms().to(total.dtype).reshape(shape) * total
        return below.sum(self.dim, keepdim=True).clamp_max(probabilities.shape[self.dim] - 1)

    def prediction(self, outputs: Tensor) -> Tensor:
        """int64 class of each element, of length 1 in `dim`."""
        return outputs.argmax(self.dim, keepdim=True)


Law = Independent | Categorical

_SMALLEST_VARIANCE = 1e-7  # of a Bernoulli law whose probability is rounded to 0 or 1, in float32

BERNOULLI = Independent("Bernoulli", lambda f: f.sigmoid() * (-f).sigmoid(), threshold=0.0)
BERNOULLI_PROBABILITY = Independent(
    "Bernoulli", lambda p: 1 / (p * (1 - p)).clamp_min(_SMALLEST_VARIANCE), threshold=0.5
)
GAUSSIAN = Independent("Gaussian", lambda f: torch.full_like(f, 2.0))  # (f - y)^2, of variance 1/2
LAPLACE = Independent("Laplace", torch.ones_like)  # |f - y|, of scale 1


def huber(delta: float, curvature: float = 1.0) -> Law:
    """The law with density proportional to exp(-curvature huber_loss).

    Its Fisher information is the curvature c times the probability of an error below delta, where the loss is
    quadratic: c m / (m + 2 / (c delta) exp(-c delta^2 / 2)), with m = sqrt(2 pi / c) erf(delta sqrt(c / 2)).
    """
    inside = math.sqrt(2 * math.pi / curvature) * math.erf(delta * math.sqrt(curvature / 2))
    outside = 2 / (curvature * delta) * math.exp(-curvature * delta**2 / 2)
    information = curvature * inside / (inside + outside)
    return Independent("Huber", lambda f: torch.full_like(f, information))


def smooth_l1(beta: float) -> Law:
    """The law with density proportional to exp(-smooth_l1_loss), which is huber_loss / beta."""
    return LAPLACE if beta == 0 else huber(beta, 1 / beta)
