"""A factor of the losses of models in float16, whose gradients would otherwise fall below the smallest numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradtrace.data.batches import Measure, measure_at
from gradtrace.task import Batch

_FLOAT16_SCALE = 2.0**10  # a power of two: it changes no digit. Largest number 2^16, smallest 2^-24


def loss_scale(model: nn.Module) -> float:
    """By which losses are multiplied before they are differentiated; 1 for models without weights in float16."""
    return _FLOAT16_SCALE if any(parameter.dtype == torch.float16 for parameter in model.parameters()) else 1.0


def scaled(measure: Measure, factor: float) -> Measure:
    """The measure times a factor."""
    return measure if factor == 1 else _Scaled(measure, factor)


@dataclass(frozen=True)
class _Scaled:
    measure: Measure
    factor: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.measure(model, batch).float() * self.factor

    def at(self, positions: Tensor) -> Measure:
        return _Scaled(measure_at(self.measure, positions), self.factor)

    @property
    def degree(self) -> float:
        degree: float = getattr(self.measure, "degree", 1.0)
        return degree
