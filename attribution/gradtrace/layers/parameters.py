"""Layers of single parameters that functions are called with: a matrix, a table of tokens, a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.layers.base import IDENTITY, Bases, Layer, Uses, real_values, rotate
from gradtrace.layers.embedding import numbers_among, sum_by_token
from gradtrace.layers.linear import LinearLayer, joined, positions


@dataclass(frozen=True, eq=False)
class CallInputs:
    """The arguments of a call besides the parameter.

    values: the matrix's input, or the tokens; None for a bias
    rows: (first, end) of the parameter's rows that the call used
    padding: the token whose row gets no gradient
    """

    values: Tensor | None
    rows: tuple[int, int]
    padding: int | None = None

    def changed(self, change: Callable[[Tensor], Tensor], count: int) -> CallInputs:
        """The inputs with `change` applied, which then have `count` entries."""
        return self if self.values is None else replace(self, values=change(self.values))


class ParameterLayer(Layer):
    """A layer of a single parameter, whose name is the layer's."""

    @property
    def name(self) -> str:
        return self.names[0]

    def padded(self, d: Tensor, rows: tuple[int, int]) -> Tensor:
        """Gradients at the outputs of the given rows, padded with zeros. [..., end - first] -> [..., all rows]."""
        (first, end), count = rows, self.groups * self.outputs
        return d if end - first == d.shape[-1] == count else F.pad(d, (first, count - end))

    def weight_gradient(self, weight: Tensor) -> Tensor:
        parameter = self.module.get_parameter(self.names[0]).detach()
        return weight.reshape(len(weight), *real_values(parameter).shape)


class MatrixLayer(ParameterLayer, LinearLayer):
    """W [out, in] in calls x W^T."""

    def __init__(self, module: nn.Module, name: str) -> None:
        Layer.__init__(self, module, [name], (1, *module.get_parameter(name).shape))

    def factors(self, inputs: CallInputs, d: Tensor) -> tuple[Tensor, Tensor]:
        assert inputs.values is not None
        return inputs.values, self.padded(d, inputs.rows)


class BiasLayer(ParameterLayer):
    """b [out], added at every position. One group [1, 1] for each element."""

    rotates = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, [name], (module.get_parameter(name).numel(), 1, 1))

    def factors(self, inputs: CallInputs, d: Tensor) -> tuple[Tensor, Tensor]:
        d = self.padded(d, inputs.rows)
        return d, d

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        return positions(d).sum((1, 2))[..., None, None]  # [batch, out, 1, 1]

    def merged(self, uses: Uses) -> Uses:
        return joined(uses)


class TableLayer(ParameterLayer):
    """W [tokens, n], both an embedding and an output layer, as in most language models: x W^T and W[tokens].

    Both roles add to one gradient [tokens, n]. The factors of a lookup are (gradient at the output, tokens), where a
    token stands for a one-hot vector on the output side. Tokens keep their coordinates, as in `EmbeddingLayer`; the
    other side rotates. The gradient of a large table is held for one example at a time at most.
    """

    rotates_outputs = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, [name], (1, *module.get_parameter(name).shape))

    def factors(self, inputs: CallInputs, d: Tensor) -> tuple[Tensor, Tensor]:
        values = inputs.values
        assert values is not None
        if values.is_floating_point():
            return values, self.padded(d, inputs.rows)
        if inputs.padding is not None:
            d = d.masked_fill((values == inputs.padding).unsqueeze(-1), 0)
        return d, values

    def position_sizes(self, x: Tensor, d: Tensor) -> tuple[int, ...]:
        return tuple(d.shape[:-1] if d.is_floating_point() else d.shape)

    def positions(self, d: Tensor) -> int:
        return d[0].numel() // (self.outputs if d.is_floating_point() else 1)

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        return rotate(positions(x), basis)

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        if d.is_floating_point():
            return rotate(positions(d), basis)
        tokens = d.reshape(d.shape[0], 1, -1)
        return F.one_hot(tokens, self.outputs).float() if basis is None else basis[0][tokens]

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        if bases.outputs is not None:  # a random projection
            return super().gradient(x, d, bases)
        a = self.input_factors(x, bases.inputs)[:, 0]  # [batch, positions, r]
        if d.is_floating_point():
            return (positions(d)[:, 0].mT @ a).unsqueeze(1)  # [batch, 1, tokens, r]
        return sum_by_token(d, a, self.outputs).unsqueeze(1)

    def coordinates(self, x: Tensor, d: Tensor, bases: Bases, kept: Tensor) -> Tensor:
        if bases.outputs is not None:
            return self.gradient(x, d, bases).flatten(1).index_select(1, kept)
        a = self.input_factors(x, bases.inputs)[:, 0]  # [batch, positions, r]
        r = a.shape[2]
        tokens, row = kept.div(r, rounding_mode="floor").unique(return_inverse=True)
        if d.is_floating_point():
            sums = positions(d)[:, 0].index_select(2, tokens).mT @ a  # [batch, tokens, r]
        else:
            # all other tokens share an extra row
            sums = sum_by_token(numbers_among(tokens, self.outputs)[d], a, len(tokens) + 1)
        return sums.flatten(1).index_select(1, row * r + kept % r)

    def merged(self, uses: Uses) -> Uses:
        products = [(x, d) for x, d in uses if d.is_floating_point()]
        lookups = [(x, d.unsqueeze(-1)) for x, d in uses if not d.is_floating_point()]
        merged = joined(products) if products else []
        return merged + ([(x, d.squeeze(-1)) for x, d in joined(lookups)] if lookups else [])

    def _rotated_gradient(self, x: Tensor, d: Tensor, bases: Bases) -> Tensor:
        return self.gradient(x, d, bases)  # a table has more rows than there are positions to rotate

    def inner_products(self, left: Uses, right: Uses) -> Tensor:
        """sum_pq (x_p . y_q) (d_p . e_q) over the positions p, q of both examples; no table is formed."""
        rows = []
        for number in range(len(left[0][0])):
            example = slice(number, number + 1)
            rows.append(sum(self._products(x[example], d[example], y, e) for x, d in left for y, e in right))
        return torch.stack(rows)  # type: ignore[arg-type]

    def _products(self, x: Tensor, d: Tensor, y: Tensor, e: Tensor) -> Tensor:
        """`inner_products` of a use (x, d) by a single example with a use (y, e) by a batch. [batch]"""
        inputs = positions(x)[0, 0] @ positions(y)[:, 0].flatten(0, 1).T  # [p, batch * q]
        d_tokens, e_tokens = (None if t.is_floating_point() else t.flatten() for t in (d, e))  # one-hot vectors
        if d_tokens is None and e_tokens is None:
            outputs = positions(d)[0, 0] @ positions(e)[:, 0].flatten(0, 1).T
        elif d_tokens is None:
            outputs = positions(d)[0, 0][:, e_tokens]
        elif e_tokens is None:
            outputs = positions(e)[:, 0].flatten(0, 1)[:, d_tokens].T
        else:
            outputs = (d_tokens[:, None] == e_tokens).to(inputs.dtype)
        return (inputs * outputs).sum(0).view(len(y), -1).sum(1)


def parameter_layer(module: nn.Module, name: str, is_table: bool) -> ParameterLayer | None:
    """The layer of a parameter, by the parameter's shape; None for shapes whose calls give no factors.

    is_table: an Embedding has the parameter
    """
    dimensions = module.get_parameter(name).dim()
    if dimensions == 2:
        return TableLayer(module, name) if is_table else MatrixLayer(module, name)
    return BiasLayer(module, name) if dimensions == 1 else None
