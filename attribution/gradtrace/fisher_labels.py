"""The Fisher information: gradients at labels of the model's own predictions (Kunstner et al. 2019 tell why).

For classifiers of few classes the expectation over the labels is exact: each example counts with every class, by its
probability. A trained model gives most of its examples one class with near certainty, so that labels drawn from it
would hardly ever show what the rarer ones add, which is nearly all. For others, one label is drawn for each example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.batches import ExampleBatch
from gradtrace.encoder import GradientModel
from gradtrace.task import Example, Label

_MOST_CLASSES = 20  # for which every class is taken: each may cost another gradient of every example
_NEGLIGIBLE = 1e-2  # share of the Fisher's trace


def class_probabilities(scores: Tensor) -> Tensor:
    """[batch, classes] probabilities from scores that are logits, log-probabilities or probabilities already."""
    sums = scores.sum(1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        return scores
    return scores.float().softmax(1)


class FisherBatch(NamedTuple):
    """Examples with labels of the model's own, and how much each one's square counts. weights: float32 [batch]"""

    batch: ExampleBatch
    weights: Tensor


def fisher_batches(model: GradientModel, samples: Iterable[Sequence[Example]], seed: int) -> Iterator[FisherBatch]:
    """The samples with labels from the model's predictions; with their own labels if the task predicts nothing.

    The weights of an example's labels sum to one, but for classes so improbable that they are left out. The same seed
    and samples give the same labels.
    """
    for number, examples in enumerate(samples):
        predicted = _predicted(model, examples)
        if predicted is not None and predicted.dim() == 2 and 1 < predicted.shape[1] <= _MOST_CLASSES:
            yield from _with_every_class(model, examples, class_probabilities(predicted))
        else:
            if predicted is not None:
                labels = _draw_labels(model, predicted, examples, seed, number)
                examples = _labelled(model, examples, labels)
            yield FisherBatch(model.batch(examples), torch.ones(len(examples), device=model.device))


def _predicted(model: GradientModel, examples: Sequence[Example]) -> Tensor | None:
    if not model.task.has_predict:
        return None
    with torch.no_grad():
        return model.task.predict(model.model, model.batch(examples).collated)


def _with_every_class(model: GradientModel, examples: Sequence[Example], chances: Tensor) -> Iterator[FisherBatch]:
    """Pairs of example and class, in batches as large as `examples`. chances: [examples, classes]"""
    # Of softmax and cross-entropy, a class adds to the Fisher's trace about in proportion to its probability, but for
    # the likeliest, which adds less and is kept for the weights' sum.
    likeliest = chances.amax(1, keepdim=True)
    kept = (chances >= _NEGLIGIBLE / chances.shape[1] * (1 - likeliest).mean()) | (chances == likeliest)
    for pairs in kept.nonzero().split(len(examples)):  # [batch, 2]
        rows, labels = pairs.T.tolist()
        batch = model.batch(_labelled(model, [examples[row] for row in rows], labels))
        yield FisherBatch(batch, chances[pairs[:, 0], pairs[:, 1]].float())


def _labelled(model: GradientModel, examples: Sequence[Example], labels: Sequence[Label]) -> list[Example]:
    return [model.task.with_label(e, y) for e, y in zip(examples, labels, strict=True)]


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
        # One deviation to either side instead of normal noise: the square of each gradient is its expectation then.
        noise = random_numbers.rademacher(seed, stream, 0, len(examples)).tolist()
        spread = _noise_scale(model, examples, values)
        return [value + scale * z for value, scale, z in zip(values, spread, noise, strict=True)]


def _noise_scale(model: GradientModel, examples: Sequence[Example], values: Sequence[Label]) -> list[float]:
    """Standard deviation of the Gaussian whose negative log-likelihood is the loss: c (f - y)^2 has 1 / sqrt(2 c)."""
    task = model.task
    at = [
        task.loss(
            model.model, model.batch([task.with_label(e, y + shift) for e, y in zip(examples, values, strict=True)]).collated,
        )
        for shift in (0.0, 1.0)
    ]
    return (2 * (at[1] - at[0]).double().clamp_min(1e-12)).rsqrt().tolist()
