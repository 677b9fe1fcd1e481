"""What exactly is explained for each query: which label, and which quantity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch.utils._pytree import tree_flatten

from gradtrace.data.batches import size_of
from gradtrace.errors import LossError, QueryError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.task_model import MeasureName
from gradtrace.task import Example, Label, Task

QUERY_BATCH = 64  # examples that go through the model together


@dataclass(frozen=True, slots=True)
class Query:
    """An example with a label, what is measured on it, and what the last checkpoint says of it."""

    example: Example
    measure: MeasureName
    target: str
    label: Label | None
    prediction: Label | None


def resolve_queries(model: GradientModel, examples: Sequence[Example], target: str | None) -> list[Query]:
    """Fill in missing labels with the model's predictions, and choose what is measured.

    A class label that was not given is the predicted one. A value that was not given would make the residual, and with
    it the gradient of the loss, zero: then the predicted value itself is explained (its negative is measured, so that
    proponents are the rows that raised it).

    Raises:
        QueryError: an unknown target, or a label is missing and the task predicts none.
    """
    task = model.task
    if target not in (None, "loss"):
        raise QueryError(f'unknown target {target!r}; leave it out or pass "loss"')
    name: MeasureName = "measurement" if task.has_measurement and target is None else "loss"
    labels = [model.label(example) for example in examples]
    lacking = [_lacks_label(task, example, label) for example, label in zip(examples, labels, strict=True)]
    predictions = _predictions(model, examples, lacking)
    queries = []
    for example, label, lacks, prediction in zip(examples, labels, lacking, predictions, strict=True):
        explained: tuple[MeasureName, str] = (name, name)
        if lacks and prediction is not None:
            example = task.with_label(example, prediction)
            explained = (name, f"{name} at the predicted label")
            if isinstance(prediction, float) and name == "loss":
                explained = ("prediction", "prediction")
        queries.append(Query(example, *explained, label, prediction))
    return queries


def is_one_example(examples: object, train_example: Example) -> bool:
    """Whether what was passed as examples is of the form of a single one."""
    (given, given_form), (leaves, form) = tree_flatten(examples), tree_flatten(train_example)
    return bool(given_form == form) and all(
        type(a) is type(b) and np.ndim(a) == np.ndim(b) for a, b in zip(given, leaves, strict=True)
    )


def require_labels(task: Task, examples: Sequence[Example]) -> None:
    """Raises QueryError where training examples are missing, or the label of one: there is no gradient without."""
    if not len(examples):
        raise QueryError("no training example to score")
    for number, example in enumerate(examples):
        if _lacks_label(task, example, task.label(example)):
            raise QueryError(f"training example {number} has no label: what would be learnt from it depends on that")


def query_batches(model: GradientModel, queries: Sequence[Query]) -> Iterator[tuple[list[int], MeasureName]]:
    """The queries' numbers in batches of one measure each, small enough to be differentiated together."""
    kinds: dict[MeasureName, list[int]] = {}
    for number, query in enumerate(queries):
        kinds.setdefault(query.measure, []).append(number)
    for measure, numbers in kinds.items():
        for places in _batches(model, [queries[number].example for number in numbers]):
            yield [numbers[place] for place in places], measure


def _batches(model: GradientModel, examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples that may go through the model together. Where all training rows are of one size, nothing is
    known of padding: then examples are not padded to each other's."""
    by_size: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        by_size.setdefault(0 if model.examination.varied else size_of(example), []).append(number)
    for numbers in by_size.values():
        for start in range(0, len(numbers), QUERY_BATCH):
            yield numbers[start : start + QUERY_BATCH]


@contextmanager
def named_in_errors(numbers: Sequence[int], what: str = "query") -> Iterator[None]:
    """A loss or gradient that is NaN or infinite is reported with the number of its query among all that were asked.

    numbers: of the queries, or of what else the batch holds
    """
    try:
        yield
    except LossError as error:
        raise error.naming_asked(numbers, what) from error


def _predictions(model: GradientModel, examples: Sequence[Example], lacking: Sequence[bool]) -> list[Label | None]:
    """The last checkpoint's prediction for each example; a placeholder stands for a missing label meanwhile."""
    task = model.task
    predictions: list[Label | None] = [None] * len(examples)
    explained = model.predicts
    if model.predicts:
        complete = [task.with_label(e, 0) if lacks else e for e, lacks in zip(examples, lacking, strict=True)]
        for numbers in _batches(model, complete):
            predicted = model.predict(model.batch([complete[number] for number in numbers]))
            explained = task.has_predict or not predicted.is_floating_point()
            for number, prediction in zip(numbers, predicted.tolist(), strict=True):
                predictions[number] = prediction
    if any(lacking) and not explained:
        raise QueryError(
            f"the example has no label, and {type(task).__name__} defines no predict(self, model, batch) to take one "
            "from: give a label"
        )
    return predictions


def _lacks_label(task: Task, example: Example, label: Label | None) -> bool:
    """Whether a label is missing. None is no proof: labels may be tensors, and language models have none at all."""
    is_pair = isinstance(example, tuple | list) and len(example) == 2
    if type(task).label is not Task.label:  # the task knows
        return label is None and (is_pair or type(task).with_label is not Task.with_label)
    return is_pair and example[1] is None
