"""Rows of the zoo, and small models that many cases share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 40
CLASSES = 3
VOCABULARY = 30


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(*shape: int, rows: int = ROWS, classes: int = CLASSES) -> list[tuple[Tensor, int]]:
    """(input [*shape], label) pairs; the input of a class has a mean of its own."""
    drawn = generator()
    labels = torch.randint(classes, (rows,), generator=drawn).tolist()
    return [(torch.randn(*shape, generator=drawn) + 0.3 * label, label) for label in labels]


def lengths(low: int = 3, high: int = 12, rows: int = ROWS, first: Sequence[int] = ()) -> list[int]:
    """Random lengths, the first as given."""
    return [*first, *torch.randint(low, high, (rows - len(first),), generator=generator(2)).tolist()]


def texts(sizes: Sequence[int] | None = None, vocabulary: int = VOCABULARY, seed: int = 0) -> list[tuple[Tensor, int]]:
    """(tokens [length], label) pairs; token 0 is never drawn."""
    drawn = generator(seed)
    return [
        (torch.randint(1, vocabulary, (size,), generator=drawn), int(torch.randint(CLASSES, (), generator=drawn)))
        for size in (lengths() if sizes is None else sizes)
    ]


def pad(examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Tokens [batch, longest], filled with zeros on the right, and labels [batch]."""
    tokens = nn.utils.rnn.pad_sequence([example[0] for example in examples], batch_first=True)
    return tokens, torch.tensor([example[1] for example in examples])


def pad_with_lengths(examples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, labels = pad(examples)
    return tokens, torch.tensor([len(example[0]) for example in examples]), labels


def each(losses: Tensor) -> Tensor:
    """The mean over all but the first dimension. [batch]."""
    return losses.flatten(1).mean(1)


def next_token_loss(logits: Tensor, tokens: Tensor, summed: bool = False) -> Tensor:
    """Cross-entropy of each next token that is not 0, summed or averaged over an example's tokens. [batch]."""
    keep = (tokens[:, 1:] != 0).float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none") * keep
    return losses.sum(1) if summed else losses.sum(1) / keep.sum(1)


def mlp(inputs: int = 6, outputs: int = CLASSES, hidden: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)
