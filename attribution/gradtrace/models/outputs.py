"""The labels that the model would give: from the loss itself, else from the task's predictions, else unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradtrace import random_numbers
from gradtrace.data.batches import Measure, values_of
from gradtrace.errors import TaskError
from gradtrace.labels.call_readers import LossCall
from gradtrace.labels.interception import RecordedLoss
from gradtrace.labels.laws import BERNOULLI, BERNOULLI_PROBABILITY, Categorical
from gradtrace.labels.loss_analysis import LossSample, analyse_loss
from gradtrace.labels.sampled_gradients import LossOutputs
from gradtrace.models.task_model import TaskModel
from gradtrace.store.manifest import FisherEntry, FisherSource
from gradtrace.task import Batch, Example, Label

_BERNOULLI_LAWS = (BERNOULLI, BERNOULLI_PROBABILITY)
MOST_CLASSES = 20  # for which every class is taken: each may cost another gradient of every example
_QUADRATIC = 1e-2  # relative difference from a parabola that rounding explains


@dataclass(frozen=True, eq=False)
class Outputs:
    """What is known of a model's outputs.

    source: where the labels of the Fisher information come from: "loss", the laws of the loss functions that the loss
        calls; "predict", drawn from Task.predict and set by Task.with_label; "empirical", the rows' own labels.
    description: the same in words.
    exact: the expectation over the labels is taken, not a draw.
    loss: for source "loss".
    from_loss: predictions are known without Task.predict, from the outputs in the loss.
    of_classes: an example's label is a class by the loss, whatever type of number it has.
    boundary: of a classifier with one output, the value of Task.predict above which the class is 1; None: another.
    """

    source: FisherSource
    description: str
    exact: bool
    loss: LossOutputs | None = None
    from_loss: bool = False
    of_classes: bool = False
    boundary: float | None = None

    def with_loss(self, loss: Measure) -> Outputs:
        """The same of another copy of the task, with this loss."""
        return self if self.loss is None else replace(self, loss=replace(self.loss, loss=loss))

    @property
    def fisher(self) -> FisherEntry:
        """For a manifest."""
        return FisherEntry(source=self.source, description=self.description)

    def recording(self) -> RecordedLoss | None:
        """The task's loss, whose evaluation tells predictions; None where these are not from the loss."""
        return self.loss.recording() if self.loss is not None and self.from_loss else None

    def predicted(self, model: nn.Module, names: Sequence[str], batch: Batch) -> Tensor:
        """Predictions from the outputs in the loss. names: of the parameters that are trained"""
        predictions = None if self.loss is None else predictions_of(self.loss.recorded(model, names, batch))
        assert predictions is not None  # asked for only where predictions are `from_loss`
        return predictions

    def label(self, label: Label | None) -> Label | None:
        """The label of an example, as whole number where it is a class."""
        is_class = self.of_classes and isinstance(label, float) and label.is_integer()
        return int(label) if is_class and label is not None else label

    def predictions(self, predicted: Tensor) -> Tensor:
        """int64 [batch] classes or float [batch] values, from what Task.predict returns.

        Raises:
            TaskError: that is of another shape.
        """
        if predicted.dim() == 2 and predicted.shape[1] > 1:
            return predicted.argmax(1)
        if predicted.dim() not in (1, 2):
            raise TaskError(wrong_prediction(predicted))
        flat = predicted.flatten()
        if self.boundary is None:
            return flat
        return (flat > self.boundary).long() if flat.is_floating_point() else flat.long()


def predictions_of(calls: Sequence[LossCall] | None) -> Tensor | None:
    """int64 classes or float values, one for each label that the calls are of, [labels]; None if there are none."""
    if not calls:
        return None
    return torch.cat([call.parts[0].law.prediction(call.parts[0].outputs).flatten() for call in calls])


def wrong_prediction(predicted: object) -> str:
    given = f"shape {list(predicted.shape)}" if isinstance(predicted, Tensor) else f"a {type(predicted).__name__}"
    return (
        f"predict returns {given}, where one prediction an example is needed: [batch, classes] scores, or [batch] "
        "values or classes. Where examples have several outputs (pixels, tokens, boxes), leave predict out: neither "
        "gradients nor curvature need it"
    )


def model_outputs(model: TaskModel, examples: Sequence[Example]) -> Outputs:
    """What is known of the outputs, from a few examples.

    Raises:
        TaskError: Task.predict fails, or returns what is not one prediction for each example.
    """
    examples = _finite(model, examples)
    predicted = _predicted(model, examples)
    batch = model.collated(examples)
    sample = LossSample(model.task.loss, model.model, model.trainable, batch, lambda: model.collated(examples[:1]))
    in_loss = analyse_loss(sample)
    if isinstance(in_loss, LossOutputs):
        return _from_loss(in_loss, model, examples, predicted)
    unusable = unusable_predictions(model, predicted, examples)
    if unusable is None and predicted is not None:
        return _from_predictions(predicted)
    description = f"the loss implies no known law ({in_loss}), and neither do predictions ({unusable})"
    return Outputs("empirical", description, False)


def _finite(model: TaskModel, examples: Sequence[Example]) -> Sequence[Example]:
    """Those whose losses are numbers, if there are any: others are refused when their turn comes, by their row."""
    finite = values_of(model.task.loss, model.model, model.collated(examples)).isfinite().tolist()
    return [example for example, kept in zip(examples, finite, strict=True) if kept] or examples


def _predicted(model: TaskModel, examples: Sequence[Example]) -> Tensor | None:
    if not model.task.has_predict:
        return None
    try:
        with torch.no_grad():
            predicted = model.task.predict(model.model, model.collated(examples))
    except Exception as error:
        raise TaskError(f"predict fails on training rows: {type(error).__name__}: {error}") from error
    if not isinstance(predicted, Tensor) or predicted.dim() not in (1, 2) or len(predicted) != len(examples):
        raise TaskError(wrong_prediction(predicted))
    return predicted


def _from_predictions(predicted: Tensor) -> Outputs:
    if predicted.dim() == 2 and predicted.shape[1] > 1:
        classes = predicted.shape[1]
        exact = classes <= MOST_CLASSES
        how = "exact expectation over the classes" if exact else "labels drawn"
        return Outputs("predict", f"categorical over {classes} classes (Task.predict), {how}", exact)
    if predicted.is_floating_point():
        return Outputs("predict", "Gaussian around the values of Task.predict, exact expectation", True)
    return Outputs("predict", "the predicted classes of Task.predict, which gives no scores to draw others from", False)


def _from_loss(
    in_loss: LossOutputs, model: TaskModel, examples: Sequence[Example], predicted: Tensor | None
) -> Outputs:
    law = in_loss.law
    exact = law is not None and (not isinstance(law, Categorical) or (in_loss.classes or 0) <= MOST_CLASSES)
    several = "" if law is not None else "several labels an example: "
    how = "labels drawn" if not exact else "exact expectation" + " over the classes" * isinstance(law, Categorical)
    beside = "; other terms of the loss are left out" if in_loss.has_other_terms else ""
    labels = [model.task.label(example) for example in examples]
    zero_one = _labels_are_zero_or_one(in_loss)
    of_classes = isinstance(law, Categorical) or zero_one
    return Outputs(
        "loss",
        f"{several}{', '.join(in_loss.functions)}, {how}{beside}",
        exact,
        in_loss,
        from_loss=predicted is None and _targets_are_labels(in_loss, labels, of_classes),
        of_classes=of_classes,
        boundary=_boundary(in_loss, model, examples, predicted) if zero_one else None,
    )


def _labels_are_zero_or_one(in_loss: LossOutputs) -> bool:
    """Whether the law is Bernoulli's, and no target is a probability."""
    if in_loss.law not in _BERNOULLI_LAWS or in_loss.targets is None:
        return False
    return bool(((in_loss.targets == 0) | (in_loss.targets == 1)).all())


def _targets_are_labels(in_loss: LossOutputs, labels: Sequence[Label | None], of_classes: bool) -> bool:
    """Whether what the loss compares the outputs with is the examples' labels, so that outputs predict these."""
    known = [label for label in labels if label is not None]
    if in_loss.law is None or (in_loss.law in _BERNOULLI_LAWS and not of_classes):
        return False
    if not known:
        return of_classes
    if in_loss.targets is None or len(known) < len(labels):
        return False
    return torch.allclose(in_loss.targets, torch.tensor(known, dtype=torch.float64), rtol=1e-4)


def _boundary(
    in_loss: LossOutputs, model: TaskModel, examples: Sequence[Example], predicted: Tensor | None
) -> float | None:
    """See `Outputs`; for labels that are 0 and 1 alone."""
    if predicted is not None and predicted.dim() == 2 and predicted.shape[1] > 1:
        return None
    if predicted is None or not predicted.is_floating_point():
        return 0.5
    calls = in_loss.recorded(model.model, model.trainable, model.collated(examples))
    outputs = torch.cat([call.parts[0].outputs.flatten() for call in calls]).float()
    probabilities = outputs.sigmoid() if in_loss.law is BERNOULLI else outputs
    flat = predicted.flatten().float()
    if torch.allclose(flat, probabilities, rtol=1e-3, atol=1e-5):
        return 0.5
    return 0.5 if in_loss.law is BERNOULLI_PROBABILITY and bool(((flat >= 0) & (flat <= 1)).all()) else 0.0


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
            uniforms = random_numbers.uniforms(seed, stream, 0, len(examples), chances.device)
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
    at, above = (_losses_at(model, examples, [value + shift for value in values]) for shift in (0.0, 1.0))
    return (2 * (above - at).double().clamp_min(1e-12)).rsqrt().tolist()


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
