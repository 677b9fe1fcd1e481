"""The most probable classes of a query, or of the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.models.class_probabilities import probabilities_of_classes
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import Query, query_example_batches

MOST_PROBABLE = 20


@dataclass(frozen=True, slots=True)
class ClassProbability:
    """A class, by its number, and its probability by the model at the last checkpoint used."""

    label: int
    probability: float


def last_model_used(contents: IndexContents, blocks: Sequence[int]) -> GradientModel:
    """The model at the last checkpoint of these blocks; the trained model, if it is among them or they are of none."""
    entries, last = contents.manifest.checkpoints, contents.manifest.last_checkpoint
    used = [block for block in blocks if entries[block].kind == "weights"]
    return contents.models[last if last in used or not used else used[-1]]


def class_probabilities(model: GradientModel, queries: Sequence[Query]) -> Tensor | None:
    """float64 [queries, classes]; None where the task gives no scores of classes."""
    together: dict[int, Tensor] = {}
    for numbers, batch in query_example_batches(model, queries):
        probabilities = probabilities_of_classes(model, batch)
        if probabilities is None:
            return None
        together |= dict(zip(numbers, probabilities, strict=True))
    return torch.stack([together[number] for number in range(len(queries))])


def most_probable(probabilities: Tensor) -> list[ClassProbability]:
    """The largest first, of equals the lower class. probabilities: [queries, classes], whose mean is taken"""
    mean = probabilities.mean(0)
    order = mean.argsort(descending=True, stable=True)[:MOST_PROBABLE].tolist()
    return [ClassProbability(label, float(mean[label])) for label in order]
