"""The model's probabilities of the classes of each example: from the outputs in the loss, else from Task.predict."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.data.batches import ExampleBatch
from gradtrace.labels.call_readers import LossPart
from gradtrace.labels.laws import BERNOULLI, BERNOULLI_PROBABILITY, Categorical
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.outputs import class_probabilities
from gradtrace.task import Example


def probabilities_of_classes(model: GradientModel, batch: ExampleBatch) -> Tensor | None:
    """float64 [batch, classes] on the CPU; None where the task gives no scores of classes. batch: with labels"""
    in_loss = _from_loss(model, batch)
    return _from_predictions(model, batch) if in_loss is None else in_loss


def probabilities_by_class(part: LossPart) -> Tensor | None:
    """Of what a loss function was called with, float64 [labels, classes]; None if its law is not one of classes."""
    outputs = part.outputs.detach().double()
    if isinstance(part.law, Categorical):
        return part.law.probabilities(outputs).movedim(part.law.dim, -1).flatten(0, -2)
    if part.law not in (BERNOULLI, BERNOULLI_PROBABILITY):
        return None
    ones = (outputs.sigmoid() if part.law is BERNOULLI else outputs).flatten()
    return torch.stack([1 - ones, ones], dim=1)


def number_of_classes(model: GradientModel, example: Example, labels: NDArray[np.float64]) -> int | None:
    """How many classes the labels of the task are of; None: they are values, or nothing is known of them.

    Without class scores or names, the labels of the training rows tell it.

    example: a training row.  labels: of all of them, NaN for unknown ones
    """
    batch = model.batch([example])
    probabilities = probabilities_of_classes(model, batch)
    if probabilities is not None:
        return probabilities.shape[1]
    if model.task.class_names is not None:
        return len(model.task.class_names)
    of_values = model.predicts and model.predict(batch).is_floating_point()
    if of_values or not isinstance(model.label(example), int):
        return None
    return int(np.nanmax(labels)) + 1


def _from_loss(model: GradientModel, batch: ExampleBatch) -> Tensor | None:
    loss = model.outputs.loss
    if loss is None or loss.law is None or not model.outputs.of_classes:
        return None
    calls = loss.recorded(model.model, model.trainable, batch.collated)
    by_call = [probabilities_by_class(call.parts[0]) for call in calls]
    known = [probabilities.cpu() for probabilities in by_call if probabilities is not None]
    together = torch.cat(known) if known and len(known) == len(by_call) else None
    return together if together is not None and len(together) == len(batch) else None


def _from_predictions(model: GradientModel, batch: ExampleBatch) -> Tensor | None:
    if not model.task.has_predict:
        return None
    with torch.no_grad():
        scores = model.task.predict(model.model, batch.collated)
    if scores.dim() != 2 or scores.shape[1] < 2:
        return None
    return class_probabilities(scores).double().cpu()
