"""Embedding tables: the input side is a token, so its own basis; the output side rotates as any other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from gradtrace.layers.base import IDENTITY, Bases, Layer, Uses, register, rotate


@register(nn.Embedding)
class EmbeddingLayer(Layer):
    """A linear layer [dimensions, tokens] on one-hot inputs; E[a aT] is the diagonal of token frequencies."""

    rotates_inputs = False

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        tokens, dimensions = module.get_parameter("weight").shape
        super().__init__(module, names, (1, dimensions, tokens))

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        tokens = x.reshape(x.shape[0], 1, -1)
        if basis is None:
            return nn.functional.one_hot(tokens, self.inputs).float()
        return basis[0][tokens]  # [batch, 1, positions, r]

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        d = d.float() if d.dtype.itemsize < 4 else d
        return rotate(d.reshape(d.shape[0], 1, -1, d.shape[-1]), basis)

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        x, d = self._without_padding(x, d)
        if bases.inputs is not None:
            return super().gradient(x, d, bases)
        return self._sum_by_token(x, self.output_factors(d, bases.outputs), self.inputs)

    def coordinates(self, x: Tensor, d: Tensor, bases: Bases, kept: Tensor) -> Tensor:
        x, d = self._without_padding(x, d)
        if bases.inputs is not None:
            return super().coordinates(x, d, bases, kept)
        rows, tokens = kept.div(self.inputs, rounding_mode="floor"), kept % self.inputs
        wanted, column = tokens.unique(return_inverse=True)
        lookup = torch.full((self.inputs,), len(wanted), device=x.device)  # every other token: one column too many
        lookup[wanted] = torch.arange(len(wanted), device=x.device)
        sums = self._sum_by_token(lookup[x], self.output_factors(d, bases.outputs), len(wanted) + 1)
        return sums.flatten(1).index_select(1, rows * (len(wanted) + 1) + column)

    def squared_sum(self, uses: Uses, bases: Bases) -> Tensor:
        """As in `Layer`, holding only the tokens that stand in each example, not the whole table for each."""
        owner, tokens, parts = [], [], []
        for x, d in uses:
            x, d = self._without_padding(x, d)
            s = self.output_factors(d, bases.outputs)[:, 0]  # [batch, positions, s]
            owner.append(torch.arange(len(x), device=x.device).repeat_interleave(s.shape[1]))
            tokens.append(x.flatten())
            parts.append(s.flatten(0, 1))
        pairs, place = (torch.cat(owner) * self.inputs + torch.cat(tokens)).unique(return_inverse=True)
        values = torch.cat(parts)
        sums = values.new_zeros(len(pairs), values.shape[1]).index_add_(0, place, values)  # [pairs, s]
        squares = values.new_zeros(self.inputs, values.shape[1])
        return squares.index_add_(0, pairs % self.inputs, sums.square()).T[None]

    def inner_products(self, left: Uses, right: Uses) -> Tensor:
        """As in `Layer`, holding of each example's table only the tokens that stand in `left`: others add nothing."""
        wanted = torch.cat([x.flatten() for x, _ in left]).unique()
        lookup = torch.full((self.inputs,), len(wanted), device=wanted.device)  # every other token: one column too many
        lookup[wanted] = torch.arange(len(wanted), device=wanted.device)

        def sums(uses: Uses) -> Tensor:
            parts = (self._without_padding(x, d) for x, d in uses)
            found = (self._sum_by_token(lookup[x], self.output_factors(d, None), len(wanted) + 1) for x, d in parts)
            return reduce(torch.add, found).flatten(1)

        return sums(left) @ sums(right).T

    def _sum_by_token(self, x: Tensor, s: Tensor, tokens: int) -> Tensor:
        """Sum s [batch, 1, positions, out] over the positions of each token. Shape [batch, 1, out, tokens]."""
        batch, _, positions, outputs = s.shape
        sums = s.new_zeros(batch, tokens, outputs)
        index = x.reshape(batch, positions, 1).expand(-1, -1, outputs)
        return sums.scatter_add_(1, index, s[:, 0]).transpose(1, 2).unsqueeze(1)

    def _without_padding(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        padding = cast(nn.Embedding, self.module).padding_idx
        return (x, d) if padding is None else (x, d.masked_fill((x == padding).unsqueeze(-1), 0))

    def weight_gradient(self, weight: Tensor) -> Tensor:
        return weight.squeeze(1).transpose(1, 2)
