"""Losses of one example each: weights, several terms, sequences, derivatives inside the loss."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import ZooTask, right, seeded
from zoo.data import VOCABULARY, each, generator, labelled, lengths, mlp, next_token_loss, pad, texts

ROWS = labelled(6)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2].float()


@right()
def loss_weighted_by_the_example() -> ZooTask:
    return ZooTask(mlp, [(x, y, 0.5 + row % 3) for row, (x, y) in enumerate(ROWS)], weighted)


def focal(model: nn.Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)
    return (1 - (-loss).exp()).square() * loss


for name, loss in {
    "focal_loss_with_smoothing": focal,
    "loss_with_class_weights": lambda m, b: F.cross_entropy(m(b[0]), b[1], torch.tensor([0.5, 1, 3]), reduction="none"),
    "hinge_loss": lambda m, b: F.multi_margin_loss(m(b[0]), b[1], reduction="none"),
    "loss_by_log_softmax_and_gather": lambda m, b: -m(b[0]).log_softmax(1).gather(1, b[1][:, None])[:, 0],
    "loss_as_a_list_of_losses": lambda m, b: torch.stack(
        [F.cross_entropy(m(x[None]), y[None]) for x, y in zip(b[0], b[1], strict=True)]
    ),
    "loss_detached_for_hard_examples": lambda m, b: (lambda losses: torch.where(losses > 1.5, losses.detach(), losses))(
        F.cross_entropy(m(b[0]), b[1], reduction="none")
    ),
    "loss_in_half_of_the_examples": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none") * (b[1] > 0),
    "squared_error": lambda m, b: each((m(b[0]) - b[0][:, :3]).square()),
    "poisson_loss": lambda m, b: F.poisson_nll_loss(m(b[0])[:, 0], b[1].float(), reduction="none"),
    "gaussian_likelihood_with_a_variance": lambda m, b: F.gaussian_nll_loss(
        m(b[0])[:, 0], b[1].float(), F.softplus(m(b[0])[:, 1]) + 0.1, reduction="none"
    ),
    "binary_cross_entropy": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b[0])[:, 0], (b[1] > 0).float(), reduction="none"
    ),
}.items():
    right(name)(partial(lambda loss: ZooTask(mlp, ROWS, loss), loss))


class TwoHeads(nn.Module):
    """A class, a value, and learned weights of both losses (Kendall et al. 2018). Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).relu()
        return {"class": self.a(h), "value": self.b(h)[:, 0]}


@right(rotates=True)
def multi_task_loss_with_learned_weights() -> ZooTask:
    def loss(m: Any, b: Any) -> Tensor:
        out, (s, t) = m(b[0]), m.log_variance
        first = F.cross_entropy(out["class"], b[1], reduction="none")
        return first * (-s).exp() + (out["value"] - b[0].sum(1)).square() * (-t).exp() + s + t

    return ZooTask(TwoHeads, ROWS, loss)


class DeepSupervision(nn.Module):
    """Returns outputs at several depths, of which each has a loss; a second part is not needed for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads, self.projection = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h = self.a(x).relu()
        g = self.b(h).relu()
        return (self.heads[0](h), self.heads[1](g)), self.projection(g)


@right()
def deep_supervision() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return sum(F.cross_entropy(out, b[1], reduction="none") for out in m(b[0])[0])  # type: ignore[return-value]

    return ZooTask(DeepSupervision, ROWS, loss)


class Clip(nn.Module):
    """An image and four texts of which the first belongs to it: contrast within the example."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Embedding(VOCABULARY, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(words).mean(2), dim=-1)
        return (text @ image[:, :, None])[..., 0] * self.log_scale.exp()


@right()
def contrast_within_the_example() -> ZooTask:
    drawn = generator()
    rows = [(x, torch.randint(VOCABULARY, (4, 5), generator=drawn)) for x, _ in ROWS]
    return ZooTask(Clip, rows, lambda m, b: -m(*b).log_softmax(1)[:, 0])


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.transpose(1, 2)).relu().transpose(1, 2)).log_softmax(-1)


@right()
def connectionist_temporal_classification() -> ZooTask:
    """CTC over frames of various number, targets of various length."""
    drawn = generator()
    rows = [
        (torch.randn(size, 4, generator=drawn), torch.randint(1, 5, (1 + size % 3,), generator=drawn))
        for size in lengths(8, 14)
    ]

    def collate(examples: list[Any]) -> tuple[Any, ...]:
        padded = [nn.utils.rnn.pad_sequence(list(side), batch_first=True) for side in zip(*examples, strict=True)]
        return *padded, *(torch.tensor([len(x) for x in side]) for side in zip(*examples, strict=True))

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.ctc_loss(m(b[0]).transpose(0, 1), b[1], b[2], b[3], reduction="none") / b[3]

    return ZooTask(Speech, rows, loss, collate)


TEACHER = seeded(mlp)


@right()
def distillation_from_another_model() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        with torch.no_grad():
            wanted = TEACHER(b[0]).softmax(1)
        return F.cross_entropy(m(b[0]), wanted, reduction="none") + 0.1 * F.cross_entropy(
            m(b[0]), b[1], reduction="none"
        )

    return ZooTask(lambda: mlp(hidden=7), ROWS, loss)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).cumsum(1).tanh())


@right()
def direct_preference_optimisation() -> ZooTask:
    """Two answers for each prompt, one of them preferred; a frozen copy is the reference (Rafailov et al. 2023)."""
    reference = copy.deepcopy(seeded(Policy)).requires_grad_(False)

    def loss(m: nn.Module, b: Any) -> Tensor:
        ratios = [next_token_loss(reference(x), x, True) - next_token_loss(m(x), x, True) for x in b]
        return -F.logsigmoid(0.5 * (ratios[0] - ratios[1]))

    pairs = list(zip(texts(lengths(4)), texts(lengths(4)[::-1], seed=1), strict=True))
    rows = [(a[0], b[0]) for a, b in pairs]
    collate = lambda ex: tuple(nn.utils.rnn.pad_sequence(list(s), batch_first=True) for s in zip(*ex, strict=True))  # noqa: E731
    return ZooTask(Policy, rows, loss, collate)


@right()
def loss_with_ignored_tokens() -> ZooTask:
    """Token labels of -100 are left out, a mean over the others."""

    def loss(m: nn.Module, b: Any) -> Tensor:
        losses = F.cross_entropy(m(b[0]).transpose(1, 2), b[1], reduction="none", ignore_index=-100)
        return losses.sum(1) / (b[1] != -100).sum(1)

    rows = [(x, torch.where(torch.arange(len(x)) % 3 == 1, -100, x)) for x, _ in texts()]

    def collate(examples: list[Any]) -> tuple[Tensor, Tensor]:
        padded = (nn.utils.rnn.pad_sequence([e[i] for e in examples], True, -100 * i) for i in (0, 1))
        return next(padded), next(padded)

    return ZooTask(Policy, rows, loss, collate)


def slope(model: nn.Module, x: Tensor) -> Tensor:
    """Of a model's only output with respect to its input, to be differentiated once more."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


@right()
def loss_of_forces() -> ZooTask:
    """An energy and its derivative by the input are fitted, as in models of molecules and of physics."""
    loss = lambda m, b: (m(b[0])[:, 0] - b[1]).square() + (slope(m, b[0]) - b[0].sin()).square().sum(1)  # noqa: E731
    return ZooTask(smooth, ROWS, loss)


@right()
def loss_of_derivatives_alone() -> ZooTask:
    return ZooTask(smooth, ROWS, lambda m, b: (slope(m, b[0]) - b[0]).square().sum(1))


class Quantised(nn.Module):
    """A straight-through codebook: the nearest code replaces a vector, its gradient goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.codes = nn.Linear(6, 4), nn.Linear(4, 6), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encode(x)
        code = self.codes(torch.cdist(h, self.codes.weight).argmin(1))
        commitment = each((h - code.detach()).square()) + each((h.detach() - code).square())
        return self.decode(h + (code - h).detach()), commitment


@right()
def vector_quantised_autoencoder() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        out, commitment = m(b[0])
        return each((out - b[0]).square()) + commitment

    return ZooTask(Quantised, ROWS, loss)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.body = nn.Embedding(10, 6), mlp(6, 6)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.body(x + self.time(step))


@right()
def diffusion_with_noise_of_each_example() -> ZooTask:
    """Noise and step belong to the row, so that the loss is the same each time."""
    rows = [(x, torch.randn(6, generator=generator(row)), row % 10) for row, (x, _) in enumerate(ROWS)]
    loss = lambda m, b: each((m(b[0] + b[1] * b[2][:, None] / 10, b[2]) - b[1]).square())  # noqa: E731
    return ZooTask(Denoiser, rows, loss)


@right()
def padded_causal_model_without_a_mask() -> ZooTask:
    """Padding on the right cannot reach earlier positions of a causal model: nothing is wrong with it."""
    return ZooTask(Policy, texts(lengths(4)), lambda m, b: next_token_loss(m(b[0]), b[0]), pad)
