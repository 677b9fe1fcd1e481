"""Labels drawn from what Task.predict returns, where the loss itself does not tell the law of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.models.task_model import TaskModel
from gradtrace.task import Example, Label

MOST_CLASSES = 20  # for which every class is taken: each may cost another gradient of every example
_QUADRATIC = 1e-2  # relative difference from a parabola that rounding explains


def class_probabilities(scores: Tensor) -> Tensor:
    """[batch, classes] probabilities from scores that are logits, log-probabilities or probabilities already."""
    sums = scores.sum(1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        return scores
    return scores.float().softmax(1)


def labelled(model: TaskModel, examples: Sequence[Example], labels: Sequence[Label]) -> list[Example]:
    return [model.task.with_label(e, y) for e, y in zip(examples, labels, strict=True)]


def drawn_labels(
    model: TaskModel, predicted: Tensor, examples: Sequence[Example], seed: int, stream: int
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


def _noise_scale(model: TaskModel, examples: Sequence[Example], values: Sequence[Label]) -> list[float]:
    """Standard deviation of the Gaussian whose negative log-likelihood is the loss: c (f - y)^2 has 1 / sqrt(2 c)."""
    at, one_beside = (_losses_at(model, examples, [value + shift for value in values]) for shift in (0.0, 1.0))
    return (2 * (one_beside - at).double().clamp_min(1e-12)).rsqrt().tolist()


def _losses_at(model: TaskModel, examples: Sequence[Example], labels: Sequence[Label]) -> Tensor:
    """Losses with other labels. [batch]"""
    with torch.no_grad():
        return model.task.loss(model.model, model.collated(labelled(model, examples, labels)))


def unusable_predictions(model: TaskModel, predicted: Tensor | None, examples: Sequence[Example]) -> str | None:
    """Why labels cannot be drawn from what Task.predict returns for these examples; None where they can."""
    if predicted is None:
        return "the task defines no predict"
    try:
        if predicted.is_floating_point() and (predicted.dim() == 1 or predicted.shape[1] == 1):
            return _not_quadratic(model, predicted, examples)
        losses = _losses_at(model, examples, drawn_labels(model, predicted, examples, 0, 0))
    except Exception as error:
        return f"the loss fails on labels of the predictions' ({type(error).__name__}: {error})"
    return None if bool(losses.isfinite().all()) else "the loss of a predicted label is NaN or infinite"


def _not_quadratic(model: TaskModel, predicted: Tensor, examples: Sequence[Example]) -> str | None:
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
