"""Convolutions, norms, residual networks, segmentation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import ZooTask, right
from zoo.data import Residual, each, generator, labelled, mlp

IMAGES = labelled(3, 8, 8)


def classifier(*body: nn.Module, channels: int, spatial: int = 2) -> nn.Module:
    """A body of so many output channels, averaged over its spatial dimensions, and a head."""
    pooled = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[spatial - 1](1)
    return nn.Sequential(*body, pooled, nn.Flatten(), nn.Linear(channels, 3))


@right("mlp", rotates=True)
def perceptron() -> ZooTask:
    return ZooTask(mlp, labelled(6))


@right(rotates=True)
def convolutions_with_stride_dilation_groups() -> ZooTask:
    body = lambda: classifier(  # noqa: E731
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, (3, 2), dilation=(2, 1), padding="same", groups=2, bias=False),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),  # depthwise
        nn.Conv2d(8, 4, 1),
        channels=4,
    )
    return ZooTask(body, IMAGES)


for mode in ("zeros", "reflect", "replicate", "circular"):
    right(f"conv2d_padding_{mode}")(
        lambda mode=mode: ZooTask(
            lambda: classifier(nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode), nn.Tanh(), channels=4), IMAGES
        )
    )


@right()
def conv1d_over_time() -> ZooTask:
    make = lambda: classifier(  # noqa: E731
        nn.Conv1d(4, 6, 3, dilation=2), nn.ReLU(), nn.Conv1d(6, 6, 4, stride=2, padding=3), channels=6, spatial=1
    )
    return ZooTask(make, labelled(4, 15))


@right()
def conv3d_of_volumes() -> ZooTask:
    make = lambda: classifier(nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1), nn.ReLU(), channels=4, spatial=3)  # noqa: E731
    return ZooTask(make, labelled(2, 4, 6, 6))


def transposed(spatial: int) -> ZooTask:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    layers = lambda: (  # noqa: E731
        kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(),
        kind(6, 3, 2, dilation=2),
    )
    make = lambda: classifier(*layers(), channels=3, spatial=spatial)  # noqa: E731
    return ZooTask(make, labelled(4, *[4] * spatial))


for dimension in (1, 2, 3):
    right(f"conv_transpose{dimension}d", rotates=dimension == 2)(partial(transposed, dimension))


class UpTo(nn.Module):
    """A transposed convolution that is told its output's size."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x, output_size=[18, 17]).tanh().mean((2, 3)))


@right()
def conv_transpose_with_output_size() -> ZooTask:
    return ZooTask(UpTo, IMAGES)


class StandardisedConv(nn.Conv2d):
    """A known class with another forward: its weight is standardised first (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@right()
def weight_standardised_conv() -> ZooTask:
    return ZooTask(lambda: classifier(StandardisedConv(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), channels=6), IMAGES)


class ScaledLinear(nn.Linear):
    """A known class whose output is changed after the known product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5) * 2.0 + x.mean(-1, keepdim=True)


@right()
def linear_subclass_with_another_forward() -> ZooTask:
    return ZooTask(lambda: nn.Sequential(ScaledLinear(6, 8), nn.ReLU(), ScaledLinear(8, 3)), labelled(6))


def residual_network(norm: str = "batch") -> nn.Sequential:
    def normed(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(2, channels)

    block = Residual(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), normed(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
    )
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), normed(6), nn.ReLU(inplace=True), block, nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 3)))


@right(rotates=True)
def resnet_with_batch_norm() -> ZooTask:
    return ZooTask(residual_network, IMAGES)


@right()
def resnet_with_group_norm() -> ZooTask:
    return ZooTask(lambda: residual_network("group"), IMAGES)


@right()
def resnet_channels_last() -> ZooTask:
    make = lambda: residual_network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # noqa: E731
    loss = lambda m, b: F.cross_entropy(m(b[0].contiguous(memory_format=torch.channels_last)), b[1], reduction="none")  # noqa: E731
    return ZooTask(make, IMAGES, loss)


def frozen_body() -> nn.Module:
    model = residual_network()
    model[0].requires_grad_(False)
    return model


@right()
def resnet_with_frozen_body() -> ZooTask:
    return ZooTask(frozen_body, IMAGES)


def frozen_head_and_norms() -> nn.Module:
    model = residual_network()
    model[1].requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    model[0][0].bias.requires_grad_(False)
    return model


@right()
def resnet_with_frozen_head_norms_and_a_bias() -> ZooTask:
    return ZooTask(frozen_head_and_norms, IMAGES)


@right()
def instance_norm_with_weights() -> ZooTask:
    make = lambda: classifier(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), channels=6)  # noqa: E731
    return ZooTask(make, IMAGES)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.narrow(F.gelu(self.wide(h)))).permute(0, 3, 1, 2)


@right()
def convnext_with_layer_scale() -> ZooTask:
    return ZooTask(lambda: classifier(nn.Conv2d(3, 6, 2, stride=2), ConvNeXtBlock(), channels=6), IMAGES)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(x)
        return self.out(torch.cat([skipped, self.up(self.bottom(skipped))], dim=1))


def masks() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randint(2, (8, 8), generator=generator(row))) for row, (x, _) in enumerate(IMAGES)]


@right(rotates=True)
def unet_segmentation() -> ZooTask:
    return ZooTask(UNet, masks(), lambda m, b: each(F.cross_entropy(m(b[0]), b[1], reduction="none")))


@right()
def autoencoder_with_upsampling() -> ZooTask:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 12, 3, padding=1), nn.PixelShuffle(2)
    )
    return ZooTask(make, IMAGES, lambda m, b: each((m(b[0]) - b[0]).square()))


class OfFrames(nn.Module):
    """Frames of a clip are folded into the batch: [B, T, C, H, W] -> [B*T, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.mix, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3))
        h = h.reshape(len(x), -1, 4).transpose(1, 2)
        return self.head(self.mix(h).mean(2))


@right(rotates=True)
def frames_folded_into_the_batch() -> ZooTask:
    return ZooTask(OfFrames, labelled(5, 2, 6, 6))


class PatchesOf(nn.Module):
    """Patches are cut out first and go through a Linear layer as rows of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, 12)
        return self.head(self.patch(patches).relu().reshape(len(x), -1, 8).amax(1))


@right()
def patches_as_rows_of_one_matrix() -> ZooTask:
    return ZooTask(PatchesOf, IMAGES)
