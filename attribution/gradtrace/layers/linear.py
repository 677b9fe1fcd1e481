"""Fully connected layers, with any leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradtrace.layers.base import Layer, Uses, register, rotate, wide, with_ones


@register(nn.Linear)
class LinearLayer(Layer):
    """y = x W^T + b. All dimensions between the first and the last are positions."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        outputs, inputs = module.get_parameter("weight").shape
        super().__init__(module, names, (1, outputs, inputs + (len(names) > 1)))

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        a = positions(x)  # [batch, 1, positions, in]
        if basis is None or not self.has_bias:
            return rotate(with_ones(a) if self.has_bias else a, basis)
        return (a @ basis[0, :-1]).add_(basis[0, -1])

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        return rotate(positions(d), basis)

    def merged(self, uses: Uses) -> Uses:
        return joined(uses)


def positions(x: Tensor) -> Tensor:
    """[batch, ..., features] -> [batch, 1, positions, features], float32 or wider."""
    return wide(x).reshape(x.shape[0], 1, -1, x.shape[-1])


def joined(uses: Uses) -> Uses:
    """One use with the positions of all uses. Both sides [batch, positions, features]."""
    sides = [[values.reshape(len(values), -1, values.shape[-1]) for values in use] for use in uses]
    x, d = (torch.cat(list(side), dim=1) for side in zip(*sides, strict=True))
    return [(x, d)]


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearLayer(LinearLayer):
    """y = x W + b with W [in, out], as transformers' Conv1D."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        inputs, outputs = module.get_parameter("weight").shape
        Layer.__init__(self, module, names, (1, outputs, inputs + (len(names) > 1)))

    def weight_gradient(self, weight: Tensor) -> Tensor:
        return weight.squeeze(1).transpose(1, 2)
