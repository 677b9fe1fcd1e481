"""What a loss is of: -log p of each example's label, the squared error of a value, or neither, as losses show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.labels.call_readers import LossPart
from gradtrace.labels.laws import GAUSSIAN, Categorical
from gradtrace.models.class_probabilities import probabilities_by_class
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.outputs import class_probabilities
from gradtrace.store.manifest import FisherEntry, Output
from gradtrace.task import Example

_ROUNDING = 1e-3  # relative
_SATURATED = 1e-5  # a loss below is that of any law


def row_fisher(model: GradientModel, examples: Sequence[Example]) -> FisherEntry:
    """What the curvature is that the rows' own gradients give, for a manifest.

    examples: training rows on which losses are compared with the model's outputs
    """
    output = loss_output(model, examples)
    descriptions = {
        "log odds": "of the log odds of each row's label, from the rows' own gradients",
        "value": "of the predicted values, from the rows' own gradients",
        None: "the loss is neither -log p of one label nor one squared error for each row, so all rows count alike",
    }
    return FisherEntry(source="rows", description=descriptions[output], output=output)


def loss_output(model: GradientModel, examples: Sequence[Example]) -> Output | None:
    """Of losses that are -log p of each example's label "log odds", of the same multiple of each squared error "value";
    None of others, and of losses with further terms."""
    losses = model.losses(model.batch(examples)).double().cpu()
    probabilities = _label_probabilities(model, examples)
    if probabilities is not None:
        expected = -probabilities.log()
        return "log odds" if torch.allclose(losses, expected, rtol=_ROUNDING, atol=_SATURATED) else None
    errors = _errors(model, examples)
    if errors is not None:
        squares = errors.square()
        factor = losses.sum() / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        smallest = _SATURATED * float(losses.abs().max())  # in the values' own unit
        return "value" if torch.allclose(losses, factor * squares, rtol=_ROUNDING, atol=smallest) else None
    return None


def _label_probabilities(model: GradientModel, examples: Sequence[Example]) -> Tensor | None:
    """float64 [batch] on the CPU; None where labels are no classes, or not known."""
    if (parts := _loss_parts(model, examples)) is not None:
        of_parts = [_probabilities(part) for part in parts]
        known = [probabilities for probabilities in of_parts if probabilities is not None]
        return torch.cat(known) if len(known) == len(of_parts) else None
    labels = [model.label(example) for example in examples]
    predicted = _predicted(model, examples)
    if predicted is None or predicted.dim() != 2 or predicted.shape[1] < 2:
        return None
    if not all(isinstance(label, int) and 0 <= label < predicted.shape[1] for label in labels):
        return None
    return class_probabilities(predicted).double().cpu().gather(1, torch.tensor(labels)[:, None])[:, 0]


def _probabilities(part: LossPart) -> Tensor | None:
    """Of the labels that a loss function was called with, [labels]."""
    by_class = probabilities_by_class(part)
    if by_class is None or part.targets is None:
        return None
    if not isinstance(part.law, Categorical) and not bool(((part.targets == 0) | (part.targets == 1)).all()):
        return None
    return by_class.gather(1, part.targets.flatten().long()[:, None])[:, 0].cpu()


def _errors(model: GradientModel, examples: Sequence[Example]) -> Tensor | None:
    """Output minus label, float64 [batch] on the CPU; None where these are no values, or not known."""
    if (parts := _loss_parts(model, examples)) is not None:
        return torch.cat([_part_errors(part) for part in parts]) if all(p.law is GAUSSIAN for p in parts) else None
    predicted, labels = _predicted(model, examples), [model.label(example) for example in examples]
    if predicted is None or predicted.numel() != len(examples) or not predicted.is_floating_point() or None in labels:
        return None
    return predicted.flatten().double().cpu() - torch.tensor(labels, dtype=torch.float64)


def _part_errors(part: LossPart) -> Tensor:
    """Of a call, [labels]. What a loss squares by hand, without a target, is taken for an error."""
    outputs = part.outputs.detach().double().flatten()
    return (outputs if part.targets is None else outputs - part.targets.double()).cpu()


def _loss_parts(model: GradientModel, examples: Sequence[Example]) -> list[LossPart] | None:
    """What the loss passes to loss functions; None unless that is known to be one label for each example, in order."""
    loss = model.outputs.loss
    if loss is None or loss.law is None:
        return None
    parts = [call.parts[0] for call in loss.recorded(model.model, model.trainable, model.collated(examples))]
    return parts if sum(part.outputs.numel() for part in parts) else None


def _predicted(model: GradientModel, examples: Sequence[Example]) -> Tensor | None:
    if model.outputs.source != "predict":
        return None
    with torch.no_grad():
        predicted: Tensor = model.task.predict(model.model, model.collated(examples))
    return predicted
