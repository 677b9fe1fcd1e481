"""A table of numbers and words, and a few texts, with small models."""

from __future__ import annotations

import torch
from torch import nn

from gradtrace.tasks import TabularRegression, TextClassification, Vocabulary

TEXTS = ["A fine film", "dull", "Fine: a dull FILM indeed", "Straße und Film", "fine fine"] * 8


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(50, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sums = self.words(ids).masked_fill(~mask[..., None], 0).sum(1)
        return self.classifier(sums / mask.sum(1, keepdim=True))


def text_task() -> TextClassification:
    vocabulary = Vocabulary(TEXTS, 50)
    data = (TEXTS, [row % 2 for row in range(len(TEXTS))])
    return TextClassification(
        Words, data, data, vocabulary_size=50, encode=lambda text: vocabulary.encode(text, 20), class_names=("-", "+")
    )


HOUSES = [[41.0, 3, "INLAND"], [None, 5, "ISLAND"], [12.5, 2, "INLAND"], [7.0, 1, "BAY"]] * 5


def house_task() -> TabularRegression:
    return TabularRegression(
        lambda: nn.Linear(5, 1),
        (HOUSES, [float(row) for row in range(20)]),
        (HOUSES[:4], [1.5, 2.0, 3.0, 4.0]),
        feature_names=("age", "rooms", "place"),
        categories={"place": ("BAY", "INLAND", "ISLAND")},
        fill={"age": 20.0},
        mean=(20.0, 3.0),
        std=(10.0, 2.0),
    )
