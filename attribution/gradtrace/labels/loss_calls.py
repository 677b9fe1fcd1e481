"""A call of a loss function: the outputs that it takes, the law of their labels, and the losses of its elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradtrace.labels.laws import Categorical, Law

Arguments = Mapping[str, Any]  # of a call, by parameter name

_NORMALIZED = 1e-2  # largest |log sum exp| of values that count as log-probabilities, also in half precision


@dataclass(frozen=True, eq=False, slots=True)
class LossPart:
    """The outputs in a call whose labels have one law.

    outputs: with their graph
    mass: the factor of each element's Fisher information, in the elements' shape
    targets: class or value of each element in the call, [elements]; None where it is neither
    """

    outputs: Tensor
    law: Law
    mass: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LossCall:
    """A call of a loss function, split into its elements' losses and their reduction.

    function: its name
    elements: losses of the elements, without their graph. In the outputs' shape, except that the dimension of classes
        has length 1 (but full length for kl_div)
    reduce: from `elements` to what the call returns; linear
    """

    function: str
    parts: Sequence[LossPart]
    elements: Tensor
    reduce: Callable[[Tensor], Tensor]

    @property
    def distributions(self) -> int:
        """How many labels the call has a law for."""
        law = self.parts[0].law
        return self.elements.sum(law.dim).numel() if isinstance(law, Categorical) else self.elements.numel()


Reader = Callable[[Arguments], LossCall | None]  # None: the call is not one whose law is known


def is_normalized(values: Tensor, dim: int) -> bool:
    """Whether `values` are log-probabilities over `dim`."""
    if not values.is_floating_point() or values.shape[dim] < 2:
        return False
    from_end = dim % values.dim() - values.dim()  # vmap puts its dimension first
    with torch.no_grad():
        unwrapped = torch.func.debug_unwrap(values, recurse=True).detach().float()
        return bool((unwrapped.logsumexp(from_end).abs() <= _NORMALIZED).all())
