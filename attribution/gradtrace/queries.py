"""What exactly is explained for each query: which label, and which quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradtrace.encoder import GradientModel
from gradtrace.errors import QueryError
from gradtrace.gradients import Measure
from gradtrace.task import Batch, Example, Label, Task


@dataclass(frozen=True, slots=True)
class Query:
    """An example with a label, what is measured on it, and what the last checkpoint says of it."""

    example: Example
    measure: Measure
    target: str
    label: Label | None
    prediction: Label | None


def resolve_queries(model: GradientModel, examples: Sequence[Example], target: str | None) -> list[Query]:
    """Fill in missing labels with the model's predictions, and choose what is measured.

    A class label that was not given is the predicted one. A value that was not given would make the residual, and with
    it the gradient of the loss, zero: then the predicted value itself is explained (its negative is measured, so that
    proponents are the rows that raised it).

    Raises:
        QueryError: an unknown target, or no label and no prediction either.
    """
    task = model.task
    if target not in (None, "loss"):
        raise QueryError(f'unknown target {target!r}; leave it out or pass "loss"')
    use_measurement = task.has_measurement and target is None
    measure, name = (task.measurement, "measurement") if use_measurement else (task.loss, "loss")
    labels = [task.label(example) for example in examples]
    predictions = _predictions(model, examples, labels)
    filled = [
        task.with_label(example, prediction) if label is None and prediction is not None else example
        for example, label, prediction in zip(examples, labels, predictions, strict=True)
    ]
    queries = []
    for example, label, prediction in zip(filled, labels, predictions, strict=True):
        own = (measure, name)
        if label is None and isinstance(prediction, float) and not use_measurement:
            own = (_PredictionMeasure(task), "prediction")
        elif label is None and prediction is not None:
            own = (measure, f"{name} at the predicted label")
        queries.append(Query(example, *own, label, prediction))
    return queries


@dataclass(frozen=True)
class _PredictionMeasure:
    """The negative predicted value."""

    task: Task

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return -self.task.predict(model, batch).flatten()


def _predictions(
    model: GradientModel, examples: Sequence[Example], labels: Sequence[Label | None]
) -> list[Label | None]:
    """The last checkpoint's prediction for each example; a placeholder stands for a missing label meanwhile."""
    task = model.task
    if not task.has_predict:
        return [None] * len(examples)
    complete = [
        task.with_label(e, 0) if label is None and _takes_label(task, e) else e
        for e, label in zip(examples, labels, strict=True)
    ]
    predicted: list[Label | None] = model.predict(model.batch(complete)).tolist()
    return predicted


def _takes_label(task: Task, example: Example) -> bool:
    """Whether the example has a place for a label: some tasks (language models, say) have none at all."""
    return (isinstance(example, tuple | list) and len(example) == 2) or type(task).with_label is not Task.with_label
