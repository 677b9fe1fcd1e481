"""Embedding tables: the input is a one-hot token and keeps its coordinates; the output side rotates as in any layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from gradtrace.layers.base import IDENTITY, Bases, Layer, Uses, register, rotate
from gradtrace.layers.linear import positions


@register(nn.Embedding)
class EmbeddingLayer(Layer):
    """A linear layer [dimensions, tokens] on one-hot inputs; E[a aT] is the diagonal of token frequencies."""

    rotates_inputs = False

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        tokens, dimensions = module.get_parameter("weight").shape
        super().__init__(module, names, (1, dimensions, tokens))

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        tokens = x.reshape(x.shape[0], 1, -1)
        return nn.functional.one_hot(tokens, self.inputs).float() if basis is None else basis[0][tokens]

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        return rotate(positions(d), basis)

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        x, d = self._without_padding(x, d)
        if bases.inputs is not None:
            return super().gradient(x, d, bases)
        return _sums(x, self.output_factors(d, bases.outputs), self.inputs)

    def coordinates(self, x: Tensor, d: Tensor, bases: Bases, kept: Tensor) -> Tensor:
        x, d = self._without_padding(x, d)
        if bases.inputs is not None:
            return super().coordinates(x, d, bases, kept)
        rows, tokens = kept.div(self.inputs, rounding_mode="floor"), kept % self.inputs
        distinct, column = tokens.unique(return_inverse=True)
        chosen = numbers_among(distinct, self.inputs)[x]
        sums = _sums(chosen, self.output_factors(d, bases.outputs), len(distinct) + 1)  # [batch, 1, s, distinct + 1]
        return sums.flatten(1).index_select(1, rows * (len(distinct) + 1) + column)

    def squared_sum(self, uses: Uses, bases: Bases) -> Tensor:
        """As in `Layer`, but holds only the tokens that occur in each example, not a whole table for each."""
        examples, tokens, factors = [], [], []
        for x, d in uses:
            x, d = self._without_padding(x, d)
            s = self.output_factors(d, bases.outputs)[:, 0]  # [batch, positions, s]
            examples.append(torch.arange(len(x), device=x.device).repeat_interleave(s.shape[1]))
            tokens.append(x.flatten())
            factors.append(s.flatten(0, 1))
        # a pair: (example, token that occurs in it)
        pairs, pair = (torch.cat(examples) * self.inputs + torch.cat(tokens)).unique(return_inverse=True)
        values = torch.cat(factors)
        sums = values.new_zeros(len(pairs), values.shape[1]).index_add_(0, pair, values)  # [pairs, s]
        squares = values.new_zeros(self.inputs, values.shape[1])
        return squares.index_add_(0, pairs % self.inputs, sums.square()).T[None]

    def inner_products(self, left: Uses, right: Uses) -> Tensor:
        """As in `Layer`, but holds only the columns of tokens that occur in `left`: others add nothing."""
        tokens = torch.cat([x.flatten() for x, _ in left]).unique()
        columns = numbers_among(tokens, self.inputs)

        def gradients(uses: Uses) -> Tensor:
            unpadded = (self._without_padding(x, d) for x, d in uses)
            by_use = (_sums(columns[x], self.output_factors(d, None), len(tokens) + 1) for x, d in unpadded)
            return reduce(torch.add, by_use).flatten(1)

        return gradients(left) @ gradients(right).T

    def support(self, uses: Uses) -> Tensor | None:
        tokens: Tensor = torch.cat([x.flatten() for x, _ in uses]).unique()
        rows = torch.arange(self.outputs, device=tokens.device)[:, None] * self.inputs
        return (rows + tokens).flatten()

    def _without_padding(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        padding = cast(nn.Embedding, self.module).padding_idx
        return (x, d) if padding is None else (x, d.masked_fill((x == padding).unsqueeze(-1), 0))

    def weight_gradient(self, weight: Tensor) -> Tensor:
        return weight.squeeze(1).transpose(1, 2)


def numbers_among(tokens: Tensor, count: int) -> Tensor:
    """Each token's number in `tokens` [n], n for all others. int64 [count]."""
    numbers = torch.full((count,), len(tokens), device=tokens.device)
    numbers[tokens] = torch.arange(len(tokens), device=tokens.device)
    return numbers


def sum_by_token(tokens: Tensor, values: Tensor, count: int) -> Tensor:
    """Sum values [batch, positions, n] over the positions of each token. [batch, count, n]."""
    sums = values.new_zeros(len(tokens), count, values.shape[2])
    return sums.scatter_add_(1, tokens.reshape(len(tokens), -1, 1).expand_as(values), values)


def _sums(tokens: Tensor, s: Tensor, count: int) -> Tensor:
    """As `sum_by_token`, of output factors [batch, 1, positions, s]. [batch, 1, s, count]."""
    return sum_by_token(tokens, s[:, 0], count).mT.unsqueeze(1)
