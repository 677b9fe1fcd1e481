"""Convolutions of one, two and three dimensions: any stride, dilation, groups and padding mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.layers.base import Layer, register, rotate, wide, with_ones

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionLayer(Layer):
    """A linear layer on patches: for each group a matrix [out / groups, in / groups * kernel (+ 1)].

    Patches times a basis are a convolution whose kernels are the basis, so no patch is unfolded.
    """

    module: nn.modules.conv._ConvNd
    pointwise = False

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        conv = cast(nn.modules.conv._ConvNd, module)
        self.patches_per_input = prod(conv.kernel_size)
        patch = conv.in_channels // conv.groups * self.patches_per_input + (len(names) > 1)
        super().__init__(conv, names, (conv.groups, conv.out_channels // conv.groups, patch))

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[: -1 - len(self.module.kernel_size)])

    def position_sizes(self, x: Tensor, d: Tensor) -> tuple[int, ...]:
        channels = d.dim() - 1 - len(self.module.kernel_size)
        return (*d.shape[:channels], 0, *d.shape[channels + 1 :])

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        if self._has_instances(x):
            return _merge_images(self.input_factors(x.flatten(0, 1), basis), x.shape[:2])
        if basis is None:
            patches = self._patches(x)
            return with_ones(patches) if self.has_bias else patches
        kernels = basis[:, :-1] if self.has_bias else basis  # [groups, patch, r]
        bias = basis[:, -1].flatten() if self.has_bias else None
        shape = (-1, self.module.in_channels // self.groups, *self.module.kernel_size)
        return self._by_group(self._convolve(x, kernels.transpose(1, 2).reshape(shape), bias))

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        if self._has_instances(d):
            return _merge_images(self.output_factors(d.flatten(0, 1), basis), d.shape[:2])
        return rotate(self._by_group(d), basis)

    def _has_instances(self, values: Tensor) -> bool:
        """Whether each example has several images: [batch, images, channels, *space]."""
        return values.dim() > 2 + len(self.module.kernel_size)

    def _by_group(self, x: Tensor) -> Tensor:
        """[batch, channels, *space] -> [batch, groups, positions, channels / groups]."""
        x = wide(x)
        if self.groups == 1:  # one transpose; free for channels_last
            return x.flatten(2).transpose(1, 2).unsqueeze(1)
        return x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, -1).transpose(2, 3)

    def _patches(self, x: Tensor) -> Tensor:
        """All patches, from one strided slice for each kernel element. [batch, groups, positions, patch]."""
        conv, space = self.module, len(self.module.kernel_size)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        extent = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        slices = []
        for offset in product(*map(range, conv.kernel_size)):
            start = [d * o for d, o in zip(conv.dilation, offset, strict=True)]
            stop = [x.shape[2 + i] - extent[i] + start[i] for i in range(space)]
            window: Any = (..., *map(slice, start, stop, conv.stride))
            slices.append(x[window].flatten(2))  # [batch, channels, positions]
        patches = torch.stack(slices, dim=2)  # [batch, channels, kernel, positions]
        return wide(patches.reshape(x.shape[0], self.groups, self.inputs - self.has_bias, -1).transpose(2, 3))

    def _convolve(self, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.module
        padding: str | tuple[int, ...] = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0,) * len(conv.kernel_size)
        convolution = _CONVOLUTIONS[len(conv.kernel_size)]
        return convolution(x.to(kernels.dtype), kernels, bias, conv.stride, padding, conv.dilation, conv.groups)


def _merge_images(factors: Tensor, shape: Sequence[int]) -> Tensor:
    """[batch * images, groups, positions, n] -> [batch, groups, images * positions, n]. shape: (batch, images)."""
    return factors.view(*shape, *factors.shape[1:]).transpose(1, 2).flatten(2, 3)
