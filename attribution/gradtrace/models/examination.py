"""The examination of a task's model on a sample of rows: paths of gradients, outputs, what can be measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradtrace.data.batches import Measure
from gradtrace.data.dataset import fetch
from gradtrace.data.sample import Sample, sample_of
from gradtrace.gradients.path_choice import examine
from gradtrace.gradients.plan import PathChoice
from gradtrace.models.outputs import Outputs, model_outputs
from gradtrace.models.task_model import TaskModel, copied
from gradtrace.task import Example


class Examination(NamedTuple):
    """The properties of a task that a sample of rows shows; they hold at every checkpoint.

    choice: how the parameters are differentiated.
    outputs: the labels that the model would give, and its predictions.
    measurement: whether Task.measurement, if there is one, could be tried: training examples or task.query have what it
        needs.
    varied: whether the sample had examples of several sizes, so that padding was seen to change nothing.
    """

    choice: PathChoice
    outputs: Outputs
    measurement: bool
    varied: bool


def examined(model: TaskModel, sample: Sample, examples: Sequence[Example]) -> Examination:
    """Examine a model in eval mode, with a checkpoint's weights.

    examples: few, to find the outputs on.  Raises as `GradientModel`.
    """
    model = _in_single(model, sample)
    measured = _measured_samples(model, sample)
    choice = examine(model.model, measured, model.trainable)
    return Examination(
        choice,
        model_outputs(model, examples),
        measurement=model.task.measurement in [measure for measure, _ in measured],
        varied=not sample.examples.uniform,
    )


def _in_single(model: TaskModel, sample: Sample) -> TaskModel:
    """The model in float32, if it is in half precision and runs so: rounding then hides no difference between paths."""
    if not any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.model.parameters()):
        return model
    in_single = copy.copy(model)
    in_single.model = copied(model.model).float()
    return model if _tried(in_single, model.task.loss, sample) is None else in_single


def _measured_samples(model: TaskModel, sample: Sample) -> list[tuple[Measure, Sample]]:
    """Everything that is differentiated: the loss of training examples; the measurement, of queries where training
    examples do not have what it needs; and predicted values."""
    measured: list[tuple[Measure, Sample]] = [(model.task.loss, sample)]
    if model.task.has_measurement:
        for tried in (sample, _query_sample(model, len(sample.rows))):
            if tried is not None and _tried(model, model.task.measurement, tried) is not None:
                measured.append((model.task.measurement, tried))
                break
    predicted = _tried(model, model.task.predict, sample) if model.task.has_predict else None
    if predicted is not None and predicted.is_floating_point() and predicted.shape in ((1,), (1, 1)):  # a value
        measured.append((model.measure("prediction"), sample))
    return measured


def _query_sample(model: TaskModel, count: int) -> Sample | None:
    queries = model.task.query
    if queries is None or not len(queries):
        return None
    rows = list(range(min(count, len(queries))))
    return sample_of(model.task, rows, fetch(queries, rows), model.device)


def _tried(model: TaskModel, measure: Measure, sample: Sample) -> Tensor | None:
    """The values for the sample's first example; None if the measure is not made for such examples."""
    try:
        with torch.no_grad():
            values = measure(model.model, sample.examples.alone(0).collated)
    except Exception:  # from the user's code
        return None
    return values if isinstance(values, Tensor) else None
