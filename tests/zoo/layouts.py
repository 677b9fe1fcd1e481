"""Where the examples of a batch lie within a layer's input: folded, repeated, moved, shared, or not there at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention import NanoGPT
from zoo.case import BATCH, ZooTask, right
from zoo.data import ROWS as COUNT
from zoo.data import VOCABULARY, generator, labelled, lengths, mlp, next_token_loss, pad, texts

ROWS = labelled(6)


class Concatenated(nn.Module):
    """Both sides of a pair go through the tower as one batch of twice the size: first all left ones, then all right."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right_ = self.tower(torch.cat([a, b])).chunk(2)
        return (left - right_).square().sum(1)


@right(rotates=True)
def pairs_concatenated_along_the_batch() -> ZooTask:
    rows = [(x, ROWS[(i + 7) % COUNT][0]) for i, (x, _) in enumerate(ROWS)]
    return ZooTask(Concatenated, rows, lambda m, b: F.softplus(1 - m(b[0], b[1])))


class Interleaved(Concatenated):
    """The same, but the sides of each pair lie next to each other."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        h = self.tower(torch.stack([a, b], dim=1).flatten(0, 1))
        return (h[::2] - h[1::2]).square().sum(1)


@right()
def pairs_interleaved_along_the_batch() -> ZooTask:
    rows = [(x, ROWS[(i + 7) % COUNT][0]) for i, (x, _) in enumerate(ROWS)]
    return ZooTask(Interleaved, rows, lambda m, b: F.softplus(1 - m(b[0], b[1])))


@right()
def preferences_concatenated_along_the_batch() -> ZooTask:
    """Chosen and rejected answers, padded to one length, go through the model at once."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        chosen, rejected = next_token_loss(m(b), b, True).chunk(2)
        return F.softplus(0.02 * (chosen - rejected))

    rows = [(a[0], b[0]) for a, b in zip(texts(lengths(4)), texts(lengths(4)[::-1], seed=1), strict=True)]
    collate = lambda ex: nn.utils.rnn.pad_sequence([e[0] for e in ex] + [e[1] for e in ex], True)  # noqa: E731
    return ZooTask(NanoGPT, rows, loss, collate)


class Views(nn.Module):
    """Several views of each example, repeated along the batch, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([x, x.flip(1), 2 * x])
        return self.body(views).view(3, len(x), 3).mean(0)


@right()
def views_repeated_along_the_batch() -> ZooTask:
    return ZooTask(Views, ROWS)


class TimeFolded(nn.Module):
    """Time comes first and is folded with the batch: [time, batch, width] -> [time x batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.transpose(0, 1).reshape(-1, 6)).relu()
        return self.head(h).view(x.shape[1], len(x), 3).amax(0)


for steps in (5, BATCH):
    right(f"time_folded_before_the_batch_{steps}_steps", rotates=steps == 5)(
        lambda steps=steps: ZooTask(TimeFolded, labelled(steps, 6))
    )


class Permuted(nn.Module):
    """All layers see the batch in another order, which is put back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.body(x[order])[order.argsort()]


@right()
def batch_reordered_within_the_model_and_put_back() -> ZooTask:
    rows = sorted(ROWS[:2], key=lambda row: float(row[0][0])) + ROWS[2:]
    return ZooTask(Permuted, rows)


class Windows(nn.Module):
    """Windows of an image are folded into the batch, the second time shifted (Liu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def attend(self, x: Tensor) -> Tensor:
        batch, side = x.shape[:2]
        windows = x.view(batch, side // 2, 2, side // 2, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
        q, k, v = self.qkv(self.norm(windows)).chunk(3, -1)
        h = self.out((q @ k.mT / 2).softmax(-1) @ v)
        return x + h.view(batch, side // 2, side // 2, 2, 2, 4).transpose(2, 3).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return self.head(self.attend(x.roll((1, 1), (1, 2))).mean((1, 2)))


@right()
def shifted_windows_folded_into_the_batch() -> ZooTask:
    return ZooTask(Windows, labelled(4, 4, 4))


class Axial(nn.Module):
    """Rows of an image, then its columns, are sequences of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x.flatten(0, 1))[0].view_as(x)
        columns = h.permute(2, 0, 1, 3).flatten(0, 1)  # the column comes first, then the example
        return self.head(self.columns(columns).tanh().mean(1).view(x.shape[2], len(x), 4).mean(0))


@right()
def rows_and_columns_folded_into_the_batch() -> ZooTask:
    return ZooTask(Axial, labelled(3, 5, 4))


class Choices(nn.Module):
    """Several answers to a question, as [batch x answers, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.score = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.body(self.embed(x.flatten(0, 1)))[1][-1]).view(x.shape[:2])


@right()
def multiple_choice() -> ZooTask:
    words = torch.randint(VOCABULARY, (COUNT, 3, 5), generator=generator())
    return ZooTask(Choices, [(x, row % 3) for row, x in enumerate(words)])


class OneByOne(nn.Module):
    """Layers get one example at a time, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(row) for row in x])


@right()
def layers_without_a_batch_dimension() -> ZooTask:
    return ZooTask(OneByOne, ROWS)


class Microbatches(nn.Module):
    """The batch goes through the layers in pieces of four."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(piece) for piece in x.split(4)])


@right()
def batch_in_pieces() -> ZooTask:
    return ZooTask(Microbatches, ROWS)


class UniqueWords(nn.Module):
    """Every word of the batch is computed once, and shared by the examples that hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        words, where = x.unique(return_inverse=True)
        h, keep = self.body(self.embed(words)).tanh()[where], (x != 0).float()[..., None]
        return self.head((h * keep).sum(1) / keep.sum(1))


@right()
def words_computed_once_for_the_batch() -> ZooTask:
    return ZooTask(UniqueWords, texts(), collate=pad)


class ClassTower(nn.Module):
    """The classes' names are encoded once for the whole batch; what comes out is the classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.image, self.embed, self.text = nn.Linear(6, 4), nn.Embedding(VOCABULARY, 8), nn.Linear(8, 4)
        self.register_buffer("names", torch.randint(VOCABULARY, (classes, 3), generator=generator()))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.embed(self.names).mean(1)).T


for classes in (3, BATCH):  # as many as there are examples in a batch
    right(f"classes_encoded_once_for_the_batch_{classes}")(
        lambda classes=classes: ZooTask(lambda: ClassTower(classes), ROWS)
    )


class OneGraph(nn.Module):
    """All nodes of one graph are computed for every batch; an example is the number of a node."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        drawn = generator()
        self.register_buffer("nodes", torch.randn(nodes, 6, generator=drawn))
        edges = torch.rand(nodes, nodes, generator=drawn) < 0.2
        self.register_buffer("edges", (edges | torch.eye(nodes, dtype=torch.bool)).float().softmax(1))

    def forward(self, node: Tensor) -> Tensor:
        h = (self.edges @ self.a(self.nodes)).relu()
        return (self.edges @ self.b(h))[node]


for nodes in (COUNT, BATCH):
    right(f"nodes_of_one_graph_of_{nodes}")(
        lambda nodes=nodes: ZooTask(lambda: OneGraph(nodes), [(row % nodes, y) for row, (_, y) in enumerate(ROWS)])
    )


@right(rotates=True)
def as_many_positions_as_examples() -> ZooTask:
    """An embedding of positions, broadcast over the batch, of the same shape as one of examples."""
    return ZooTask(NanoGPT, texts([BATCH] * COUNT), lambda m, b: next_token_loss(m(b[0]), b[0]), pad)


class Coordinates(nn.Module):
    """A layer of the positions alone, broadcast over the batch; another one of the batch's own mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.value, self.head = nn.Linear(1, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(0, 1, x.shape[1])[:, None]
        return self.head((self.value(x) * self.place(places).sin()).mean(1))


for steps in (5, BATCH):
    right(f"layer_of_positions_alone_{steps}")(lambda steps=steps: ZooTask(Coordinates, labelled(steps, 6)))


class WeightInput(nn.Module):
    """A layer whose input is a parameter, not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes, self.body, self.query = nn.Parameter(torch.randn(3, 6)), mlp(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.query(x), self.body(self.prototypes))


@right()
def layer_whose_input_is_a_parameter() -> ZooTask:
    return ZooTask(WeightInput, ROWS)
