"""Batches for the Fisher information E[g gT], with g the gradient at a label y that is drawn from the model's p(y | x).

Why not at the true labels: Kunstner et al. 2019. p(y | x) comes from the loss functions that the loss calls; where that
is not known, from the task's predictions, whose labels are set by Task.with_label.

For classifiers of few classes the expectation over y is exact: each example counts with every class, weighted by its
probability. A trained model is almost certain of most examples, and nearly all of the Fisher information comes from the
other classes, which drawn labels would hardly ever be. Otherwise, one label is drawn for each output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.labels.laws import Categorical
from gradtrace.labels.sampled_gradients import LossOutputs
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.outputs import MOST_CLASSES, class_probabilities, drawn_labels, labelled
from gradtrace.task import Example

_NEGLIGIBLE = 1e-2  # share of the Fisher's trace


class FisherBatch(NamedTuple):
    """Examples, and the measure whose gradient is that of the loss at labels drawn from the model.

    weights: float32 [batch], of the square of each example's gradient.
    measure: None: the task's loss, since the examples have such labels.
    """

    batch: ExampleBatch
    weights: Tensor
    measure: Measure | None = None


def fisher_batches(model: GradientModel, samples: Iterable[Sequence[Example]], seed: int) -> Iterator[FisherBatch]:
    """The samples with labels drawn from the model; with their own labels if `model.outputs` knows no p(y | x).

    The weights of an example's labels sum to one, except that improbable classes are left out. The same seed and
    samples give the same labels.
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
    parts = [call.parts[0] for call in outputs.recorded(model.model, model.trainable, model.collated(examples))]
    probabilities = [
        law.probabilities(part.outputs.double()).movedim(law.dim, -1).flatten(0, -2) for part in parts
    ]  # each [examples of the call, classes]
    for rows, classes, weights in _likely_pairs(torch.cat(probabilities), len(examples)):
        measure = outputs.seeded(0, 0, classes)
        yield FisherBatch(model.batch([examples[row] for row in rows]), weights, measure)


def _likely_pairs(probabilities: Tensor, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, classes int64 and weights float32 of the pairs of example and class that count, in batches of `size`.

    probabilities: [examples, classes]
    """
    # With softmax and cross-entropy, a class adds to the Fisher's trace about in proportion to its probability. The
    # likeliest adds less, and is kept so that the weights sum to one.
    likeliest = probabilities.amax(1, keepdim=True)
    negligible = _NEGLIGIBLE / probabilities.shape[1] * (1 - likeliest).mean()
    kept = (probabilities >= negligible) | (probabilities == likeliest)
    for pairs in kept.nonzero().split(size):  # [batch, 2]
        yield pairs[:, 0].tolist(), pairs[:, 1], probabilities[pairs[:, 0], pairs[:, 1]].float()


def _predicted_labels(
    model: GradientModel, examples: Sequence[Example], seed: int, stream: int
) -> Iterator[FisherBatch]:
    """With labels by Task.predict and Task.with_label."""
    with torch.no_grad():
        predicted = model.task.predict(model.model, model.collated(examples))
    if predicted.dim() == 2 and 1 < predicted.shape[1] <= MOST_CLASSES:
        for rows, classes, weights in _likely_pairs(class_probabilities(predicted), len(examples)):
            batch = model.batch(labelled(model, [examples[row] for row in rows], classes.tolist()))
            yield FisherBatch(batch, weights)
    else:
        yield _unweighted(model, labelled(model, examples, drawn_labels(model, predicted, examples, seed, stream)))
