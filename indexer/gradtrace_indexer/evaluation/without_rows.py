"""Retraining without some rows, beside what an index predicts of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from gradtrace.data.batches import collate
from gradtrace.data.dataset import fetch
from gradtrace.errors import QueryError
from gradtrace.index import Index
from gradtrace.methods import METHODS
from gradtrace_indexer.evaluation.retraining import Trainer, Training, check_retrainable
from gradtrace_indexer.held_out import Split, held_out_rows
from gradtrace_indexer.writing.files import sole_writer, write_file

MOST_QUERIES = 128  # that are measured where none are named
_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class Measured:
    """A trained model on each query: what is measured, and whether it is right (None: labels are no classes)."""

    values: list[float]
    correct: list[bool] | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a method says of the removal: on each query, and in the mean over the queries.

    score_sums: of the removed rows' scores
    predicted_changes, predicted_change: in the unit of what is measured; None: the method predicts nothing in that unit
    spearman: rank correlation over the queries of score sums and measured changes; None: one of them is constant
    """

    method: str
    score_sums: list[float]
    predicted_changes: list[float] | None
    predicted_change: float | None
    spearman: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two trainings with one seed, with all rows of an index and without some, and what was predicted.

    rows, removed: numbers of training rows that the first training had, and that the second one lacked
    split, queries: the examples that were measured
    measurement: what was measured on them
    before, after: by each training, on each query;  measured: their means
    accuracy: shares of queries that are right, before and after; None: labels are no classes
    method, predicted_change: of the first of the predictions in the unit of what is measured; None: there is none
    """

    rows: int
    removed: int
    seed: int
    split: Split
    queries: list[int]
    measurement: str
    before: list[float]
    after: list[float]
    measured: tuple[float, float]
    measured_change: float
    accuracy: tuple[float, float] | None
    method: str | None
    predicted_change: float | None
    predictions: list[Prediction]

    def lines(self) -> Iterator[str]:
        """In words, and a table of the methods."""
        yield (
            f"{self.measurement}, mean of {len(self.queries)} {self.split} rows: {self.measured[0]:.5g} trained on "
            f"{self.rows:,} rows, {self.measured[1]:.5g} without {self.removed:,} of them: {self.measured_change:+.3g}"
        )
        if self.accuracy is not None:
            yield f"accuracy: {self.accuracy[0]:.1%}, {self.accuracy[1]:.1%} without"
        yield "\n| method | predicted change | rank correlation |\n|---|--:|--:|"
        for of in self.predictions:
            change = "" if of.predicted_change is None else f"{of.predicted_change:+.3g}"
            yield f"| {of.method} | {change} | {'' if of.spearman is None else f'{of.spearman:.3f}'} |"


def compare_removal(
    index: Index,
    rows: Sequence[int],
    out: Path,
    *,
    queries: Sequence[int] | None = None,
    seed: int = 0,
    methods: Sequence[str] | None = None,
) -> Comparison:
    """Train with all rows of an index and without some of them, with the same seed, and write how the measurement
    changes, beside what methods predict, to a file as JSON.

    Trainings that were finished are kept beside the file until both are: called again after a kill, it resumes.

    Args:
        rows: training rows that are left out.
        queries: rows of the task's query data that are measured, or without such data of its training data. None: at
            most 128, chosen at random, the same every time.
        methods: those compared. None: all of the index that forecast the effect of training without rows.

    Raises:
        TaskError: the task has no `fit`, or that failed.
        QueryError: there is no such row or method, or no row would be left.
        LossError: a measured value is NaN or infinite.
        LockedIndexError: another process does the same, for the same file.
        StoreError: the disk is full.
    """
    directory, task = out.with_name(f"{out.name}.trainings"), index.task
    split, numbers = _measured_rows(index, queries)
    check_retrainable(task, split)
    trainings = _trainings(index, rows, seed)
    examples = fetch(getattr(task, split), numbers)
    predictions = [_predicted(index, rows, examples, name) for name in methods or forecasting(index)]
    trainer = Trainer(task, directory, split, numbers, None)
    with sole_writer(directory):
        before, after = (_measured(index, trainer, training) for training in trainings)
        comparison = _compared(index, trainings, trainer, before, after, predictions)
        write_file(out.parent, out.name, json.dumps(asdict(comparison)).encode())
        _forget(trainer, trainings)
    return comparison


def forecasting(index: Index) -> list[str]:
    """The methods of an index whose scores estimate the effect of training without a row."""
    return [name for name in index.methods if METHODS[name].forecasts]


def _measured_rows(index: Index, queries: Sequence[int] | None) -> tuple[Split, list[int]]:
    split, numbers = held_out_rows(index.task, MOST_QUERIES if queries is None else None, index.present)
    if queries is None:
        return split, sorted(numbers)
    if unknown := [query for query in queries if query not in set(numbers)]:
        raise QueryError(f"there is no row {unknown[0]} in the {split} data to measure on")
    return split, list(queries)


def _trainings(index: Index, rows: Sequence[int], seed: int) -> tuple[Training, Training]:
    """With all rows of the index, and without some."""
    everything = np.flatnonzero(index.present)
    remaining = np.setdiff1d(everything, rows)
    if not len(remaining):
        raise QueryError("no row would be left to train on; leave out fewer")
    return Training(everything.tolist(), seed), Training(remaining.tolist(), seed)


def _predicted(index: Index, rows: Sequence[int], examples: Sequence[Any], method: str) -> Prediction:
    """Without the correlation, before anything is measured."""
    effects = index.removal(rows, examples, method=method)
    changes = [effect.predicted_change for effect in effects if effect.predicted_change is not None]
    return Prediction(
        method,
        [effect.score_sum for effect in effects],
        changes or None,
        float(np.mean(changes)) if changes else None,
        None,
    )


def _measured(index: Index, trainer: Trainer, training: Training) -> Measured:
    """Of a new training, or as it was kept of an earlier one."""
    path = trainer.directory / _name(trainer, training)
    if not path.exists():
        model = trainer.trained(training)
        measured = Measured(trainer.measured(model).tolist(), _correct(index, model, trainer))
        write_file(path.parent, path.name, json.dumps(asdict(measured)).encode())
    return Measured(**json.loads(path.read_text("utf-8")))


def _forget(trainer: Trainer, trainings: Sequence[Training]) -> None:
    """Remove what `_measured` has kept."""
    for training in trainings:
        (trainer.directory / _name(trainer, training)).unlink(missing_ok=True)
    trainer.directory.rmdir()


def _name(trainer: Trainer, training: Training) -> str:
    """Of the file of a training and the queries it is measured on."""
    return f"{training.name}-{Training(trainer.queries, 0).name[:16]}.json"


def _correct(index: Index, model: nn.Module, trainer: Trainer) -> list[bool] | None:
    """Whether the predicted class is the label, for each query; None where not all labels are classes."""
    last, dataset = index.contents.last_model, getattr(trainer.task, trainer.split)
    device, correct = next(model.parameters()).device, list[bool]()
    for start in range(0, len(trainer.queries), _TOGETHER):
        examples = fetch(dataset, trainer.queries[start : start + _TOGETHER])
        labels = [last.label(example) for example in examples]
        if not last.predicts or not all(isinstance(label, int) for label in labels):
            return None
        predicted = last.predict_by(model.eval(), collate(trainer.task, examples, device))
        if predicted.is_floating_point():
            return None
        correct += [a == b for a, b in zip(predicted.tolist(), labels, strict=True)]
    return correct


def _compared(
    index: Index,
    trainings: tuple[Training, Training],
    trainer: Trainer,
    before: Measured,
    after: Measured,
    predictions: Sequence[Prediction],
) -> Comparison:
    changes = np.array(after.values) - np.array(before.values)
    ranked = [replace(of, spearman=_spearman(np.array(of.score_sums), changes)) for of in predictions]
    first = next((of for of in ranked if of.predicted_change is not None), None)
    everything, remaining = (len(training.rows) for training in trainings)
    return Comparison(
        rows=everything,
        removed=everything - remaining,
        seed=trainings[0].seed,
        split=trainer.split,
        queries=list(trainer.queries),
        measurement="measurement" if index.task.has_measurement else "loss",
        before=before.values,
        after=after.values,
        measured=(float(np.mean(before.values)), float(np.mean(after.values))),
        measured_change=float(changes.mean()),
        accuracy=_accuracy(before, after),
        method=None if first is None else first.method,
        predicted_change=None if first is None else first.predicted_change,
        predictions=ranked,
    )


def _accuracy(before: Measured, after: Measured) -> tuple[float, float] | None:
    if before.correct is None or after.correct is None:
        return None
    return float(np.mean(before.correct)), float(np.mean(after.correct))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(spearmanr(a, b).statistic)
