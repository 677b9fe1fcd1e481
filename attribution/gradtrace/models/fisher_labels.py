"""The Fisher information: gradients at labels that the model would give (Kunstner et al. 2019 tell why).

The law of the labels comes from the loss functions that the loss calls; where that is not known, from the task's
predictions, whose labels are set by Task.with_label.

For classifiers of few classes the expectation over the labels is exact: each example counts with every class, by its
probability. A trained model gives most of its examples one class with near certainty, so that labels drawn from it
would hardly ever show what the rarer ones add, which is nearly all. For others, one label is drawn for each output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.labels.laws import Categorical
from gradtrace.labels.loss_examination import LossOutputs
from gradtrace.task import Example, Label

if TYPE_CHECKING:
    from gradtrace.models.gradient_model import GradientModel

MOST_CLASSES = 20  # for which every class is taken: each may cost another gradient of every example
_NEGLIGIBLE = 1e-2  # share of the Fisher's trace
_QUADRATIC = 1e-2  # relative difference from a parabola that rounding explains


def class_probabilities(scores: Tensor) -> Tensor:
    """[batch, classes] probabilities from scores that are logits, log-probabilities or probabilities already."""
    sums = scores.sum(1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        return scores
    return scores.float().softmax(1)


class FisherBatch(NamedTuple):
    """Examples, and the measure whose gradient is that of a loss at labels of the model's.

    weights: float32 [batch], how much the square of each example's gradient counts.
    measure: None: the task's loss, of examples that have such labels.
    """

    batch: ExampleBatch
    weights: Tensor
    measure: Measure | None = None


def fisher_batches(model: GradientModel, samples: Iterable[Sequence[Example]], seed: int) -> Iterator[FisherBatch]:
    """The samples with labels that the model would give; with their own labels where these are not known.

    Where they come from is told by `model.outputs`. The weights of an example's labels sum to one, but for classes so
    improbable that they are left out. The same seed and samples give the same labels.
    """
    outputs = model.outputs
    for number, examples in enumerate(samples):
        if outputs.loss is not None and outputs.exact and isinstance(outputs.loss.law, Categorical):
            yield from _classes_in_loss(model, outputs.loss, outputs.loss.law, examples)
        elif outputs.loss is not None:
            yield _unweighted(model, examples, outputs.loss.seeded(seed, number))
        elif outputs.source == "predict":
            yield from _predicted_labels(model, examples, seed, number)
        else:
            yield _unweighted(model, examples)


def _unweighted(model: GradientModel, examples: Sequence[Example], measure: Measure | None = None) -> FisherBatch:
    return FisherBatch(model.batch(examples), torch.ones(len(examples), device=model.device), measure)


def _classes_in_loss(
    model: GradientModel, outputs: LossOutputs, law: Categorical, examples: Sequence[Example]
) -> Iterator[FisherBatch]:
    calls = outputs.recorded(model.model, model.trainable, model.collated(examples))
    parts = [call.parts[0] for call in calls]
    chances = torch.cat([law.probabilities(own.outputs.double()).movedim(law.dim, -1).flatten(0, -2) for own in parts])
    for rows, classes, weights in _likely_pairs(chances, len(examples)):
        measure = outputs.seeded(0, 0, classes)
        yield FisherBatch(model.batch([examples[row] for row in rows]), weights, measure)


def _likely_pairs(chances: Tensor, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, classes int64 and weights float32 of the pairs of example and class that count, in batches of a size.

    chances: [examples, classes]
    """
    # Of softmax and cross-entropy, a class adds to the Fisher's trace about in proportion to its probability, but for
    # the likeliest, which adds less and is kept for the weights' sum.
    likeliest = chances.amax(1, keepdim=True)
    kept = (chances >= _NEGLIGIBLE / chances.shape[1] * (1 - likeliest).mean()) | (chances == likeliest)
    for pairs in kept.nonzero().split(size):  # [batch, 2]
        yield pairs[:, 0].tolist(), pairs[:, 1], chances[pairs[:, 0], pairs[:, 1]].float()


def _predicted_labels(
    model: GradientModel, examples: Sequence[Example], seed: int, stream: int
) -> Iterator[FisherBatch]:
    """With labels by Task.predict and Task.with_label."""
    with torch.no_grad():
        predicted = model.task.predict(model.model, model.collated(examples))
    if predicted.dim() == 2 and 1 < predicted.shape[1] <= MOST_CLASSES:
        for rows, classes, weights in _likely_pairs(class_probabilities(predicted), len(examples)):
            batch = model.batch(_labelled(model, [examples[row] for row in rows], classes.tolist()))
            yield FisherBatch(batch, weights)
    else:
        yield _unweighted(model, _labelled(model, examples, _draw_labels(model, predicted, examples, seed, stream)))


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
    at, one_beside = (_losses_at(model, examples, [value + shift for value in values]) for shift in (0.0, 1.0))
    return (2 * (one_beside - at).double().clamp_min(1e-12)).rsqrt().tolist()


def _losses_at(model: GradientModel, examples: Sequence[Example], labels: Sequence[Label]) -> Tensor:
    """Losses with other labels. [batch]"""
    with torch.no_grad():
        return model.task.loss(model.model, model.collated(_labelled(model, examples, labels)))


def unusable_predictions(model: GradientModel, predicted: Tensor | None, examples: Sequence[Example]) -> str | None:
    """Why labels cannot be drawn from what Task.predict returns for these examples; None where they can."""
    if predicted is None:
        return "the task defines no predict"
    try:
        if predicted.is_floating_point() and (predicted.dim() == 1 or predicted.shape[1] == 1):
            return _not_quadratic(model, predicted, examples)
        losses = _losses_at(model, examples, _draw_labels(model, predicted, examples, 0, 0))
    except Exception as error:
        return f"the loss fails on labels of the predictions' ({type(error).__name__}: {error})"
    return None if bool(losses.isfinite().all()) else "the loss of a predicted label is NaN or infinite"


def _not_quadratic(model: GradientModel, predicted: Tensor, examples: Sequence[Example]) -> str | None:
    """Of predicted values: only a squared error around them is a law that is known."""
    values = predicted.flatten().double().tolist()
    below, at, above, twice = (
        _losses_at(model, examples, [value + shift for value in values]).double() for shift in (-1.0, 0.0, 1.0, 2.0)
    )
    rise, scale = above - at, (above - at).abs().clamp_min(1e-12)
    bends = torch.stack([(below - above).abs() / scale, (twice - at - 4 * rise).abs() / scale])
    if bool((rise > 0).all()) and float(bends.max()) <= _QUADRATIC:  # False of NaN
        return None
    return "the loss is not a squared error around the predicted values"
