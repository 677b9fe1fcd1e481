"""Uncompressed per-example gradients, and their inner products without a row of all parameters for any example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.gradients.reference import stray_gradients
from gradtrace.layers import Layer, Uses
from gradtrace.models.gradient_model import GradientModel


@dataclass(frozen=True, eq=False)
class FullGradients:
    """The gradients of one batch at one checkpoint: factors where a layer has them, whole ones for stray parameters."""

    uses: Mapping[Layer, Uses]
    strays: Mapping[Layer, Tensor]  # each [batch, 1, 1, size]
    losses: Tensor  # [batch]

    def inner_products(self, others: FullGradients) -> dict[str, Tensor]:
        """With the gradients of another batch at the same checkpoint, by layer name. Each float32 [batch, others].

        A layer that either batch did not use is left out: it adds nothing.
        """
        used = [layer for layer in self.uses if layer in others.uses]
        products = {layer.name: layer.inner_products(self.uses[layer], others.uses[layer]) for layer in used}
        for layer, gradient in self.strays.items():
            products[layer.name] = gradient.flatten(1) @ others.strays[layer].flatten(1).T
        return products

    def times(self, factors: Tensor) -> FullGradients:
        """Each example's gradient times its factor [batch]."""
        return FullGradients(
            {layer: [_times(factors, x, d) for x, d in uses] for layer, uses in self.uses.items()},
            {layer: per_example(factors, gradient) * gradient for layer, gradient in self.strays.items()},
            self.losses,
        )

    def minus(self, others: FullGradients) -> FullGradients:
        """Each example's gradient minus that of the same position of another batch, at the same checkpoint."""
        negative = others.times(-torch.ones_like(others.losses))
        layers = {**self.uses, **negative.uses}
        return FullGradients(
            {layer: [*self.uses.get(layer, []), *negative.uses.get(layer, [])] for layer in layers},
            {layer: gradient - others.strays[layer] for layer, gradient in self.strays.items()},
            self.losses - others.losses,
        )

    def squared_norms(self) -> Tensor:
        """float64 [batch]: squares of float32 gradients may underflow. One example at a time: of the products of all
        pairs only the diagonal is wanted."""
        alone = (self._in_double(slice(position, position + 1)) for position in range(len(self.losses)))
        return torch.cat([torch.cat(list(example.inner_products(example).values())).sum(0) for example in alone])

    def _in_double(self, rows: slice) -> FullGradients:
        return FullGradients(
            {layer: [(_double(x[rows]), _double(d[rows])) for x, d in uses] for layer, uses in self.uses.items()},
            {layer: _double(gradient[rows]) for layer, gradient in self.strays.items()},
            self.losses[rows],
        )


def per_example(factors: Tensor, values: Tensor) -> Tensor:
    """Factors [batch] in a shape that multiplies [batch, ...]."""
    return factors.view(-1, *(1,) * (values.dim() - 1))


def _times(factors: Tensor, x: Any, d: Tensor) -> tuple[Any, Tensor]:
    """The factors of each example's gradient times a number; tokens stand for one-hot vectors and stay."""
    return (x, per_example(factors, d) * d) if d.is_floating_point() else (per_example(factors, x) * x, d)


def _double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values  # tokens stay what they are


def full_gradients(model: GradientModel, batch: ExampleBatch, measure: Measure | None = None) -> FullGradients:
    """The gradients of `measure`, by default the task's loss.

    Raises:
        LossError: a loss is NaN or infinite, or not one number per example.
    """
    uses: dict[Layer, Uses] = {}
    losses = model.backpropagate(batch, lambda layer, x, d: uses.setdefault(layer, []).append((x, d)), measure)
    strays: dict[Layer, list[Tensor]] = {}
    for layer, gradient in stray_gradients(model.model, measure or model.task.loss, batch, model.plan.strays):
        strays.setdefault(layer, []).append(gradient)
    return FullGradients(uses, {layer: torch.cat(slices) for layer, slices in strays.items()}, losses)
