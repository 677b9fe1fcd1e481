"""How a batch of examples becomes rows: in the coordinates of a basis, or each in the strongest of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.models.gradient_model import GradientModel

R = TypeVar("R")


class RowKind(Protocol[R]):
    """R: the rows of a batch."""

    def encode(self, model: GradientModel, batch: ExampleBatch, measure: Measure | None) -> tuple[R, Tensor]:
        """The rows of examples, and their losses [batch]. Raises as `GradientModel.encode`."""

    def placed(self, rows: R | None, places: Sequence[int], count: int) -> R:
        """`count` rows: these at their places, zeros elsewhere. None: no rows."""

    def norms(self, rows: R) -> list[float]:
        """Of each row."""


@dataclass(frozen=True)
class DenseRows:
    """Rows are tensors [batch, dimensions]."""

    basis: Basis

    def encode(self, model: GradientModel, batch: ExampleBatch, measure: Measure | None) -> tuple[Tensor, Tensor]:
        return model.encode(self.basis, batch, measure)

    def placed(self, rows: Tensor | None, places: Sequence[int], count: int) -> Tensor:
        placed = torch.zeros(count, self.basis.dimensions, device=None if rows is None else rows.device)
        if rows is not None:
            placed[list(places)] = rows
        return placed

    def norms(self, rows: Tensor) -> list[float]:
        norms: list[float] = rows.norm(dim=1).tolist()
        return norms
