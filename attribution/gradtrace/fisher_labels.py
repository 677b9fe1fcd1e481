"""The Fisher information: gradients at labels of the model's own predictions (Kunstner et al. 2019 tell why).

For classifiers of few classes the expectation over the labels is exact: each example counts with every class, by its
probability. A trained model gives most of its examples one class with near certainty, so that labels drawn from it
would hardly ever show what the rarer ones add, which is nearly all. For others, one label is drawn for each example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.encoder import GradientModel
from gradtrace.task import Batch, Example, Label

MOST_CLASSES = 20  # for which every class is taken
_LEAST_SHARE = 1e-3  # of what the class adds that adds most: classes that add less are left out


def class_probabilities(scores: Tensor) -> Tensor:
    """[batch, classes] probabilities from scores that are logits, log-probabilities or probabilities already."""
    sums = scores.sum(1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        return scores
    return scores.float().softmax(1)


@dataclass(frozen=True, slots=True)
class FisherBatch:
    """Examples with labels from the model.

    roots: [batch] square roots of the labels' probabilities, which gradients are to be multiplied by; None: ones
    examples: that it adds to their number; of one example with several labels, all but the first add nothing
    """

    batch: Batch
    roots: Tensor | None
    examples: int


def fisher_batches(model: GradientModel, samples: Iterable[Sequence[Example]], seed: int) -> Iterator[FisherBatch]:
    """The samples with labels from the model's predictions; with their own labels if the task predicts nothing.

    The same seed and samples give the same labels.
    """
    for number, examples in enumerate(samples):
        batch = model.batch(examples)
        predicted = None
        if model.task.has_predict:
            with torch.no_grad():
                predicted = model.task.predict(model.model, batch)
        if predicted is None:
            yield FisherBatch(batch, None, len(examples))
        elif predicted.dim() == 2 and 1 < predicted.shape[1] <= MOST_CLASSES:
            yield from _with_every_class(model, examples, class_probabilities(predicted))
        else:
            labels = _draw_labels(model, predicted, examples, seed, number)
            yield FisherBatch(_labelled(model, examples, labels), None, len(examples))


def _with_every_class(
    model: GradientModel, examples: Sequence[Example], probabilities: Tensor
) -> Iterator[FisherBatch]:
    """probabilities: [batch, classes]"""
    # What a class adds to the trace is about p (1 - p) for softmax and cross-entropy.
    shares = probabilities * (1 - probabilities)
    counts = shares >= _LEAST_SHARE * shares.amax(1, keepdim=True)
    new = len(examples)
    for label in range(probabilities.shape[1]):
        chosen = counts[:, label].nonzero().flatten()
        some = [examples[position] for position in chosen.tolist()]
        if some:
            yield FisherBatch(_labelled(model, some, [label] * len(some)), probabilities[chosen, label].sqrt(), new)
            new = 0


def _labelled(model: GradientModel, examples: Sequence[Example], labels: Sequence[Label]) -> Batch:
    return model.batch([model.task.with_label(e, y) for e, y in zip(examples, labels, strict=True)])


def _draw_labels(
    model: GradientModel, predicted: Tensor, examples: Sequence[Example], seed: int, stream: int
) -> list[Label]:
    with torch.no_grad():
        if predicted.dim() == 2 and predicted.shape[1] > 1:
            chances = class_probabilities(predicted).double().cumsum(1)  # [batch, classes]
            integers = random_numbers.random_integers(seed, stream, 0, len(examples), chances.device)
            uniforms = ((integers >> 11) & ((1 << 53) - 1)).double() / 2**53
            return (chances / chances[:, -1:] <= uniforms[:, None]).sum(1).tolist()
        if not predicted.is_floating_point():  # predicted classes without scores: nothing to draw from
            return predicted.flatten().tolist()
        values: list[Label] = predicted.flatten().double().tolist()
        noise = random_numbers.gaussian(seed, stream, 0, len(examples)).tolist()
        spread = _noise_scale(model, examples, values)
        return [value + scale * z for value, scale, z in zip(values, spread, noise, strict=True)]


def _noise_scale(model: GradientModel, examples: Sequence[Example], values: Sequence[Label]) -> list[float]:
    """Standard deviation of the Gaussian whose negative log-likelihood is the loss: c (f - y)^2 has 1 / sqrt(2 c)."""
    task = model.task
    at = [
        task.loss(
            model.model, model.batch([task.with_label(e, y + shift) for e, y in zip(examples, values, strict=True)])
        )
        for shift in (0.0, 1.0)
    ]
    return (2 * (at[1] - at[0]).double().clamp_min(1e-12)).rsqrt().tolist()
