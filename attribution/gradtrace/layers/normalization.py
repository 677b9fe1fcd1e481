"""Normalisation layers: LayerNorm, RMSNorm, GroupNorm and BatchNorm, with a scale and a shift for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.layers.base import IDENTITY, Bases, Layer, register, wide


class NormalizationLayer(Layer):
    """y = scale * normalized(x) + shift in each channel: one group [1, 2] for each channel, [1, 1] without a shift."""

    rotates = False

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__(module, names, (module.get_parameter("weight").numel(), 1, len(names)))

    def normalized(self, x: Tensor) -> Tensor:
        """x before scale and shift, in x's shape."""
        raise NotImplementedError

    def by_channel(self, x: Tensor) -> Tensor:
        """x as [batch, positions, channels]."""
        raise NotImplementedError

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        d = self.by_channel(wide(d))  # [batch, positions, channels]
        sums = [(d * self.by_channel(self.normalized(x))).sum(1)]
        if self.has_bias:
            sums.append(d.sum(1))
        return torch.stack(sums, dim=-1).unsqueeze(2)  # [batch, channels, 1, 2]


@register(nn.LayerNorm, nn.RMSNorm)
class LayerNormLayer(NormalizationLayer):
    """LayerNorm and RMSNorm: normalised over the last dimensions, each element of which is a channel."""

    module: nn.LayerNorm | nn.RMSNorm

    def normalized(self, x: Tensor) -> Tensor:
        shape = list(self.module.normalized_shape)
        if isinstance(self.module, nn.LayerNorm):
            return F.layer_norm(wide(x), shape, eps=self.module.eps)
        return F.rms_norm(wide(x), shape, eps=self.module.eps)

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[: -len(self.module.normalized_shape)])

    def by_channel(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.groups)


class ChannelNormLayer(NormalizationLayer):
    """GroupNorm and BatchNorm: channels are the second dimension, positions the later ones."""

    pointwise = False
    takes_instances = False

    def position_sizes(self, x: Tensor, d: Tensor) -> tuple[int, ...]:
        return (len(d), 0, *d.shape[2:])

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[:1])

    def by_channel(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)


@register(nn.GroupNorm)
class GroupNormLayer(ChannelNormLayer):
    module: nn.GroupNorm

    def normalized(self, x: Tensor) -> Tensor:
        return F.group_norm(wide(x), self.module.num_groups, eps=self.module.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormLayer(ChannelNormLayer):
    """Batch normalisation. In eval mode it is a fixed affine map, so sums over positions are taken before the map.

    In train mode, which only InfluenceRecorder uses, the statistics are those of the batch.
    """

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation, each [channels]."""
        norm = cast(nn.BatchNorm1d, self.module)
        if norm.training:  # five times as fast as torch.var_mean
            _, mean, scale = torch.native_batch_norm(wide(x), None, None, None, None, True, 0.0, norm.eps)
            return mean, scale
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        return mean, (variance + norm.eps).rsqrt()

    def normalized(self, x: Tensor) -> Tensor:
        mean, scale = self._statistics(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - mean.view(shape)) * scale.view(shape)

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        mean, scale = self._statistics(x)
        d, x = self.by_channel(wide(d)), self.by_channel(wide(x))  # [batch, positions, channels]
        total = d.sum(1)
        sums = [((d * x).sum(1) - mean * total) * scale]
        if self.has_bias:
            sums.append(total)
        return torch.stack(sums, dim=-1).unsqueeze(2)  # [batch, channels, 1, 2]
