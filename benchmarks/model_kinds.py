"""Models at realistic small sizes for `benchmarks.models`, on random data.

Dropout is off, so that a training step and a gradient row do the same work forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pad_sequence

from gradtrace import Task

CLASSES = 10
ROWS = 256
Loss = Callable[[Any, Any], Tensor]
Rows = Callable[[], list[Any]]


@dataclass(frozen=True)
class Kind:
    """A line of the table: a model with its data and loss.

    size: for people, such as "4 layers x 128, 64 tokens".
    needs: an optional library.
    """

    name: str
    size: str
    make: Callable[[], nn.Module]
    rows: Rows
    loss: Loss
    collate: Callable[[list[Any]], Any] | None = None
    batch: int = 32
    needs: str | None = None

    def task(self) -> KindTask:
        return KindTask(self)


class KindTask(Task):
    def __init__(self, kind: Kind) -> None:
        self.kind, self.train = kind, kind.rows()

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.kind.make()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.kind.loss(model, batch)

    def collate(self, examples: list[Any]) -> Any:
        return (self.kind.collate or super().collate)(examples)


def pairs(*shape: int) -> Rows:
    """(input [*shape], class) pairs."""

    def draw() -> list[Any]:
        drawn = torch.Generator().manual_seed(0)
        labels = torch.randint(CLASSES, (ROWS,), generator=drawn).tolist()
        return [(torch.randn(*shape, generator=drawn) + 0.1 * label, label) for label in labels]

    return draw


def sentences(vocabulary: int, low: int, high: int) -> Rows:
    """(tokens of a length in [low, high], class) pairs; token 0 is padding."""

    def draw() -> list[Any]:
        drawn = torch.Generator().manual_seed(0)
        sizes = torch.randint(low, high + 1, (ROWS,), generator=drawn).tolist()
        return [(torch.randint(1, vocabulary, (size,), generator=drawn), size % CLASSES) for size in sizes]

    return draw


def padded(examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return pad_sequence([x for x, _ in examples], batch_first=True), torch.tensor([y for _, y in examples])


def classify(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1], reduction="none")


def each(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(1)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token that is no padding. [batch]."""
    keep = (tokens[:, 1:] != 0).float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses.view_as(keep) * keep).sum(1) / keep.sum(1)


def averaged(*body: nn.Module, channels: int, spatial: int = 2) -> nn.Module:
    pooled = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[spatial - 1](1)
    return nn.Sequential(*body, pooled, nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def resnet9(group: bool = False) -> nn.Module:
    def conv(a: int, b: int, pool: bool = False) -> list[nn.Module]:
        norm = nn.GroupNorm(4, b) if group else nn.BatchNorm2d(b)
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), norm, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]

    body = [*conv(3, 16), *conv(16, 32, True), Residual(*conv(32, 32), *conv(32, 32)), *conv(32, 64, True)]
    return averaged(*body, *conv(64, 64, True), Residual(*conv(64, 64), *conv(64, 64)), channels=64)


def mobilenet() -> nn.Module:
    def block(width: int) -> nn.Module:
        return Residual(
            nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.BatchNorm2d(2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, width, 1),
        )  # fmt: skip

    return averaged(nn.Conv2d(3, 32, 4, stride=4), block(32), block(32), channels=32)


def unet() -> nn.Module:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
            self.bottom = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
            self.up, self.out = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            skipped = self.down(x)
            return self.out(torch.cat([skipped, self.up(self.bottom(skipped))], dim=1))

    return UNet()


def pixel_loss(m: nn.Module, b: Any) -> Tensor:
    return each(F.cross_entropy(m(b[0]), (b[0][:, 0] > 0).long(), reduction="none"))


class Clips(nn.Module):
    """Frames are folded into the batch for a CNN; an LSTM reads what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
        self.lstm, self.head = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cnn(x.flatten(0, 1)).mean((2, 3)).view(len(x), -1, 32)
        return self.head(self.lstm(h)[0][:, -1])


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 128, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 128))
        self.place = nn.Parameter(0.02 * torch.randn(1, 65, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], dim=1)
        return self.head(self.body(h + self.place)[:, 0])


class Graphs(nn.Module):
    """Two rounds of messages over the edges of all graphs of the batch, as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)
        self.message = nn.Linear(64, 64)

    def forward(self, b: dict[str, Any]) -> Tensor:
        source, target = b["edges"]
        h = self.first(b["nodes"]).relu()
        for layer in (self.second, self.second):
            h = (layer(h) + torch.zeros_like(h).index_add(0, target, self.message(h)[source])).relu()
        return self.head(torch.zeros(b["graphs"], 64).index_add(0, b["graph"], h))


def graphs() -> list[Any]:
    drawn = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, 24, (ROWS,), generator=drawn).tolist()
    return [
        (torch.randn(n, 16, generator=drawn), torch.randint(n, (2, 3 * n), generator=drawn), n % CLASSES) for n in sizes
    ]


def joined(examples: list[Any]) -> dict[str, Any]:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in examples])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return {
        "nodes": torch.cat([nodes for nodes, _, _ in examples]),
        "edges": torch.cat([edges + start for (_, edges, _), start in zip(examples, starts, strict=True)], 1),
        "graph": torch.arange(len(examples)).repeat_interleave(sizes),
        "graphs": len(examples),
        "y": torch.tensor([y for _, _, y in examples]),
    }


def of_graphs(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b), b["y"], reduction="none")


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(2000, 32), nn.Embedding(3000, 32)
        self.mean, self.bias = nn.Parameter(torch.zeros(())), nn.Embedding(3000, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.mean + self.bias(item)[:, 0] + (self.user(user) * self.item(item)).sum(1)


def ratings() -> list[Any]:
    drawn = torch.Generator().manual_seed(0)
    users, items = (torch.randint(n, (ROWS,), generator=drawn).tolist() for n in (2000, 3000))
    return list(zip(users, items, torch.randn(ROWS, generator=drawn).tolist(), strict=True))


def of_ratings(m: nn.Module, b: Any) -> Tensor:
    return (m(b[0], b[1]) - b[2].float()).square()


def triplets() -> list[Any]:
    drawn = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(128, generator=drawn) for _ in range(3)) for _ in range(ROWS)]


def of_triplets(m: nn.Module, b: Any) -> Tensor:
    return F.triplet_margin_loss(*(F.normalize(m(x), dim=1) for x in b), margin=2.0, reduction="none")


def perceptron(inputs: int = 784, outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, outputs))


def weight_normed() -> nn.Module:
    wrap = parametrizations.weight_norm
    return nn.Sequential(wrap(nn.Linear(784, 256)), nn.ReLU(), wrap(nn.Linear(256, CLASSES)))


def of_forces(m: nn.Module, b: Any) -> Tensor:
    """The derivative of a model's first output by its input is fitted."""
    x = b[0].detach().requires_grad_(True)
    with torch.enable_grad():
        slope = torch.autograd.grad(m(x)[:, 0].sum(), x, create_graph=True)[0]
    return each((slope - x.sin()).square())


IMAGE = pairs(3, 32, 32)

KINDS = [
    Kind("MLP", "784-256-128-10", perceptron, pairs(784), classify, batch=128),
    Kind("ResNet-9, BatchNorm", "143,000 weights, 32 x 32", resnet9, IMAGE, classify),
    Kind("ResNet-9, GroupNorm", "143,000 weights, 32 x 32", lambda: resnet9(True), IMAGE, classify),
    Kind("MobileNet blocks, depthwise", "2 blocks x 32", mobilenet, IMAGE, classify),
    Kind("CNN over time, dilated", "2 layers x 64, 200 steps", lambda: averaged(
        nn.Conv1d(16, 64, 5, dilation=2), nn.ReLU(), nn.Conv1d(64, 64, 5, stride=2), nn.ReLU(), channels=64, spatial=1,
    ), pairs(16, 200), classify),
    Kind("CNN over volumes", "2 layers x 16, 8 x 16 x 16", lambda: averaged(
        nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3), nn.ReLU(), channels=16, spatial=3,
    ), pairs(3, 8, 16, 16), classify),
    Kind("U-Net, transposed convolution", "2 levels x 16, 32 x 32", unet, IMAGE, pixel_loss),
    Kind("CNN of frames, then LSTM", "8 frames of 32 x 32", Clips, pairs(8, 3, 32, 32), classify),
    Kind("ViT of PyTorch's layers", "4 layers x 128, 65 tokens", ViT, IMAGE, classify),
    Kind("Graph network, one list of nodes", "64 wide, 8-23 nodes", Graphs, graphs, of_graphs, joined),
    Kind("Matrix factorisation", "2,000 + 3,000 x 32", Factors, ratings, of_ratings, batch=128),
    Kind("Siamese triplets", "128-256-128-64", lambda: perceptron(128, 64), triplets, of_triplets, batch=128),
    Kind("weight_norm", "784-256-10", weight_normed, pairs(784), classify, batch=128),
    Kind("Loss of derivatives", "64-256-128-1", lambda: nn.Sequential(
        nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 1)
    ), pairs(64), of_forces, batch=128),
]  # fmt: skip
