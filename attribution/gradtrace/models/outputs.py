"""The labels that the model would give: from the loss itself, else from the task's predictions, else unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradtrace.data.batches import Measure, values_of
from gradtrace.errors import TaskError
from gradtrace.labels.call_readers import LossCall
from gradtrace.labels.interception import RecordedLoss
from gradtrace.labels.laws import BERNOULLI, BERNOULLI_PROBABILITY, Categorical
from gradtrace.labels.loss_analysis import LossSample, analyse_loss
from gradtrace.labels.sampled_gradients import LossOutputs
from gradtrace.models.predicted_labels import MOST_CLASSES, unusable_predictions
from gradtrace.models.task_model import TaskModel
from gradtrace.store.manifest import FisherEntry, FisherSource
from gradtrace.task import Batch, Example, Label


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
        found = None if self.loss is None else predictions_of(self.loss.recorded(model, names, batch))
        assert found is not None  # asked for only where predictions are `from_loss`
        return found

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
    found = analyse_loss(
        LossSample(model.task.loss, model.model, model.trainable, batch, lambda: model.collated(examples[:1]))
    )
    if isinstance(found, LossOutputs):
        return _from_loss(found, model, examples, predicted)
    unusable = unusable_predictions(model, predicted, examples)
    if unusable is None and predicted is not None:
        return _from_predictions(predicted)
    return Outputs(
        "empirical",
        f"the loss implies no known law ({found}), and neither do predictions ({unusable})",
        False,
    )


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


def _from_loss(found: LossOutputs, model: TaskModel, examples: Sequence[Example], predicted: Tensor | None) -> Outputs:
    law = found.law
    exact = law is not None and (not isinstance(law, Categorical) or (found.classes or 0) <= MOST_CLASSES)
    several = "" if law is not None else "several labels an example: "
    how = "labels drawn" if not exact else "exact expectation" + " over the classes" * isinstance(law, Categorical)
    beside = "; other terms of the loss are left out" if found.has_other_terms else ""
    return Outputs(
        "loss",
        f"{several}{', '.join(found.functions)}, {how}{beside}",
        exact,
        found,
        from_loss=predicted is None and _targets_are_labels(found, [model.task.label(own) for own in examples]),
        of_classes=isinstance(law, Categorical) or (_is_bernoulli(found) and _has_binary_targets(found)),
        boundary=_boundary(found, model, examples, predicted),
    )


def _targets_are_labels(found: LossOutputs, labels: Sequence[Label | None]) -> bool:
    """Whether what the loss compares the outputs with is the examples' labels, so that outputs predict these."""
    known = [label for label in labels if label is not None]
    binary = _is_bernoulli(found)
    if found.law is None or (binary and not _has_binary_targets(found)):
        return False
    if not known:
        return binary or isinstance(found.law, Categorical)
    if found.targets is None or len(known) < len(labels):
        return False
    return torch.allclose(found.targets, torch.tensor(known, dtype=torch.float64), rtol=1e-4)


def _is_bernoulli(found: LossOutputs) -> bool:
    return found.law in (BERNOULLI, BERNOULLI_PROBABILITY)


def _has_binary_targets(found: LossOutputs) -> bool:
    return found.targets is not None and bool(((found.targets == 0) | (found.targets == 1)).all())


def _boundary(
    found: LossOutputs, model: TaskModel, examples: Sequence[Example], predicted: Tensor | None
) -> float | None:
    """See `Outputs`; for labels that are 0 and 1 alone."""
    if not _is_bernoulli(found) or not _has_binary_targets(found):
        return None
    if predicted is not None and predicted.dim() == 2 and predicted.shape[1] > 1:
        return None
    if predicted is None or not predicted.is_floating_point():
        return 0.5
    calls = found.recorded(model.model, model.trainable, model.collated(examples))
    outputs = torch.cat([call.parts[0].outputs.flatten() for call in calls]).float()
    chances = outputs.sigmoid() if found.law is BERNOULLI else outputs
    flat = predicted.flatten().float()
    if torch.allclose(flat, chances, rtol=1e-3, atol=1e-5):
        return 0.5
    return 0.5 if found.law is BERNOULLI_PROBABILITY and bool(((flat >= 0) & (flat <= 1)).all()) else 0.0
