"""What exactly is explained for each query: which label, and which quantity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils._pytree import tree_flatten

from gradtrace.data.batches import ExampleBatch, size_of
from gradtrace.errors import LossError, QueryError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.targets import TargetLabels, relabelled
from gradtrace.models.task_model import MeasureName
from gradtrace.task import Example, Label, Task

QUERY_BATCH = 64  # examples that go through the model together
AT_PREDICTED = " at the predicted label"  # in `Query.target`


@dataclass(frozen=True, slots=True)
class Query:
    """An example with a label, what is measured on it, and what the last checkpoint says of it.

    target: what is explained, in words
    target_labels: where the loss at other labels is explained, these: one, or two whose difference it is
    others: the examples that are explained in place of `example`: with each of these labels, or the two of a contrast
    """

    example: Example
    measure: MeasureName
    target: str
    label: Label | None
    prediction: Label | None
    target_labels: tuple[Label, ...] = ()
    others: tuple[Example, ...] = ()

    @property
    def explained(self) -> tuple[Example, ...]:
        """The examples whose measure is differentiated; the gradient of a second one is subtracted."""
        return self.others or (self.example,)

    @property
    def is_contrast(self) -> bool:
        return len(self.explained) > 1


def resolve_queries(
    model: GradientModel, examples: Sequence[Example], target: Literal["loss"] | TargetLabels | None
) -> list[Query]:
    """Fill in missing labels with the model's predictions, and choose what is measured.

    A class label that was not given is the predicted one. A value that was not given would make the residual, and with
    it the gradient of the loss, zero: then the predicted value itself is explained (its negative is measured, so that
    proponents are the rows that raised it).

    Raises:
        QueryError: a label is missing and the task predicts none, or labels cannot be replaced by those of a target.
    """
    task = model.task
    asked = [task.explained(example) for example in examples]
    examples = [explained.examples[0] for explained in asked]
    if isinstance(target, TargetLabels):
        return _at_labels(model, examples, target)
    name: MeasureName = "measurement" if task.has_measurement and target is None else "loss"
    labels = [model.label(example) for example in examples]
    lacking = [_lacks_label(task, example, label) for example, label in zip(examples, labels, strict=True)]
    predictions, are_labels = _predictions(model, examples, lacking)
    if any(lacking) and not are_labels:
        raise QueryError(
            f"the example has no label, and {type(task).__name__} defines no predict(self, model, batch) to take one "
            "from: give a label"
        )
    queries = []
    for explained, label, lacks, prediction in zip(asked, labels, lacking, predictions, strict=True):
        examples, measured = explained.examples, (name, f"{name}{explained.words}")
        if lacks and prediction is not None:
            examples = tuple(task.with_label(example, prediction) for example in examples)
            measured = (name, f"{measured[1]}{AT_PREDICTED}")
            if isinstance(prediction, float) and name == "loss":
                measured = ("prediction", "prediction")
        others = examples if len(examples) > 1 else ()
        queries.append(Query(examples[0], *measured, label, prediction, others=others))
    return queries


def _at_labels(model: GradientModel, examples: Sequence[Example], target: TargetLabels) -> list[Query]:
    """Queries about the losses at other labels. One without a label of its own has the predicted one, if any."""
    task, queries = model.task, []
    labels = [model.label(example) for example in examples]
    lacking = [_lacks_label(task, example, label) for example, label in zip(examples, labels, strict=True)]
    predictions, _ = _predictions(model, examples, lacking)
    for example, label, lacks, prediction in zip(examples, labels, lacking, predictions, strict=True):
        at_labels = relabelled(task, example, target)
        if lacks:
            example = at_labels[0] if prediction is None else task.with_label(example, prediction)
        queries.append(Query(example, "loss", target.described(task), label, prediction, target.all, at_labels))
    return queries


def joined_targets(targets: Iterable[str]) -> str:
    """What is explained of several queries, in words."""
    return " and ".join(dict.fromkeys(targets))


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
        if len(task.explained(example).examples) > 1:
            raise QueryError(f"training example {number} compares two texts: give one that could be trained on")


def query_batches(model: GradientModel, queries: Sequence[Query]) -> Iterator[tuple[list[int], MeasureName]]:
    """The queries' numbers in batches of one measure each, small enough to be differentiated together; contrasts are
    by themselves."""
    kinds: dict[tuple[MeasureName, int], list[int]] = {}
    for number, query in enumerate(queries):
        kinds.setdefault((query.measure, len(query.explained)), []).append(number)
    for (measure, _), numbers in kinds.items():
        for places in _batches(model, [queries[number].explained for number in numbers]):
            yield [numbers[place] for place in places], measure


def explained_batches(model: GradientModel, queries: Sequence[Query]) -> list[ExampleBatch]:
    """What is differentiated of some of `query_batches`; the gradients of a second batch are subtracted."""
    return [model.batch(examples) for examples in zip(*(query.explained for query in queries), strict=True)]


def query_example_batches(model: GradientModel, queries: Sequence[Query]) -> Iterator[tuple[list[int], ExampleBatch]]:
    """The queries' numbers and examples, with labels, in batches that may go through the model together."""
    examples = [query.example for query in queries]
    for numbers in _batches(model, [(example,) for example in examples]):
        yield numbers, model.batch([examples[number] for number in numbers])


def _batches(model: GradientModel, explained: Sequence[Sequence[Example]]) -> Iterator[list[int]]:
    """Numbers of queries that may go through the model together, each of one example or two. Where all training rows
    are of one size, nothing is known of padding: then examples are not padded to each other's."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for number, examples in enumerate(explained):
        sizes = () if model.examination.varied else tuple(map(size_of, examples))
        by_size.setdefault(sizes, []).append(number)
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


def _predictions(
    model: GradientModel, examples: Sequence[Example], lacking: Sequence[bool]
) -> tuple[list[Label | None], bool]:
    """The last checkpoint's prediction for each example, and whether it may stand for a missing label; a placeholder
    does meanwhile."""
    task = model.task
    predictions: list[Label | None] = [None] * len(examples)
    are_labels = model.predicts
    if model.predicts:
        complete = [task.with_label(e, 0) if lacks else e for e, lacks in zip(examples, lacking, strict=True)]
        for numbers in _batches(model, [(example,) for example in complete]):
            predicted = model.predict(model.batch([complete[number] for number in numbers]))
            are_labels = task.has_predict or not predicted.is_floating_point()
            for number, prediction in zip(numbers, predicted.tolist(), strict=True):
                predictions[number] = prediction
    return predictions, are_labels


def _lacks_label(task: Task, example: Example, label: Label | None) -> bool:
    """Whether a label is missing. None is no proof: labels may be tensors, and language models have none at all."""
    is_pair = isinstance(example, tuple | list) and len(example) == 2
    if task.has_label:  # the task knows
        return label is None and (is_pair or type(task).with_label is not Task.with_label)
    return is_pair and example[1] is None
