"""Factors of all weights that are computed where they are needed, layer by layer: the weights are many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gradtrace.fitted.curvature import ALL_COLUMNS, Columns

_PIECE = 1 << 20  # factors that are computed at a time, for what that takes in between


class Factors(Protocol):
    """float32 [coordinates]; a tensor is one."""

    def __getitem__(self, columns: Columns, /) -> Tensor: ...


class ComputedFactors:
    """Factors of which none is in memory before it is asked for.

    of_columns: the factors at some of `count` coordinates, floating point [n]
    """

    def __init__(self, of_columns: Callable[[Columns], Tensor], count: int) -> None:
        self._of_columns, self._count = of_columns, count

    def __getitem__(self, columns: Columns, /) -> Tensor:
        if isinstance(columns, Tensor):
            return self._of_columns(columns).float()
        start, stop, _ = columns.indices(self._count)
        factors = torch.empty(max(stop - start, 0))
        for first in range(start, stop, _PIECE):
            last = min(first + _PIECE, stop)
            factors[first - start : last - start] = self._of_columns(slice(first, last))
        return factors

    def whole(self) -> Tensor:
        """All of them. float32 [coordinates]"""
        return self[ALL_COLUMNS]
