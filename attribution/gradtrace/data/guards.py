"""Checks for what would silently make attribution wrong. Each problem is refused with its remedy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from gradtrace.data.batches import Measure, values_of
from gradtrace.data.dataset import content_hash, fetch
from gradtrace.data.sample import Sample
from gradtrace.errors import DatasetError, LossError, TaskError
from gradtrace.store.precision import LARGEST_VALUE
from gradtrace.task import Task

_ROWS_READ_TWICE = 16  # to see whether they stay the same


def rounding(dtype: torch.dtype) -> float:
    """The largest relative difference between two computations of the same value that counts as rounding."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def check_losses(losses: Tensor, batch: int | None) -> None:
    """Refuse losses that are not one finite number per example. batch: number of examples; None: any

    Raises:
        LossError: wrong shape or dtype, or NaN or infinite values.
    """
    _check_shape(losses, batch)
    check_finite(losses, "loss")


def _check_shape(losses: Tensor, batch: int | None) -> None:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or (batch is not None and losses.shape[0] != batch):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"the loss has shape {shape} where one number per example is needed, [{batch or 'batch'}]: "
            'do not reduce it; in PyTorch losses, pass reduction="none" (then average over tokens or outputs, if any, '
            "but not over the batch)"
        )
    if not losses.is_floating_point():
        raise LossError(f"the loss has dtype {losses.dtype}; a floating-point number per example is needed")


def check_finite(values: Tensor, what: str) -> None:
    """Raises LossError if an example's value or values are NaN, infinite, or too large to be stored.

    values: [batch] or [batch, n].  what: they are, for the message
    """
    if values.numel() and not float(torch.linalg.vector_norm(values.detach(), torch.inf)) <= LARGEST_VALUE:  # or NaN
        finite = values.abs() <= LARGEST_VALUE
        bad = (~finite).reshape(len(values), -1).any(1).nonzero().flatten().tolist()
        raise LossError(
            f"the {what} of {len(bad)} example(s) is NaN or infinite, or above {LARGEST_VALUE:.0e} (positions {bad[:5]}"
            " of the batch): check these examples for missing values, the checkpoint for divergence, and the loss for "
            "log(0) and for roots of zero. A model in float16 overflows above 65,504: run it in bfloat16 or float32",
            bad,
        )


def check_dataset(task: Task, skip_unreadable: bool = False) -> int:
    """Refuse a data set that is a loader or a stream, is empty, or returns random examples. Returns the number of rows.

    skip_unreadable: ignore rows that cannot be read, for an index that skips them

    Raises:
        DatasetError: the data set is refused.
        TaskError: the task is not a Task.
    """
    if not isinstance(task, Task):
        given, remedy = f"an object of {type(task).__name__}", "subclass gradtrace.Task"
        if isinstance(task, type):
            given, remedy = f"the class {task.__name__}", f"pass an instance, {task.__name__}()"
        raise TaskError(f"the task is {given}, not a gradtrace.Task: {remedy}")
    train: Any = getattr(task, "train", None)
    if isinstance(train, DataLoader):
        raise DatasetError(
            "task.train is a DataLoader; pass its data set (loader.dataset): rows must keep their numbers"
        )
    is_map_style = hasattr(train, "__len__") and hasattr(train, "__getitem__")
    if isinstance(train, IterableDataset | Mapping) or not is_map_style:
        raise DatasetError("task.train must be a map-style data set: len(train) and train[i]")
    if len(train) == 0:
        raise DatasetError("task.train is empty")
    for row in sorted({len(train) * number // _ROWS_READ_TWICE for number in range(_ROWS_READ_TWICE)}):
        try:
            first, second = fetch(train, [row]) + fetch(train, [row])
        except DatasetError:
            if skip_unreadable:
                continue
            raise
        if content_hash(first) != content_hash(second):
            raise DatasetError(
                f"task.train[{row}] differs from one call to the next: switch random augmentation and shuffling off "
                "in the task's training set; attribution needs the same example under the same number"
            )
    return len(train)


def check_batched_losses(model: nn.Module, measure: Measure, sample: Sample) -> Sample:
    """Refuse losses that are reduced, random, or depend on the other examples of the batch.

    Returns the sample without the examples whose losses are NaN or infinite, which the build refuses or skips.

    Raises:
        LossError: the losses are refused, or none of them is finite.
    """
    with torch.no_grad():
        first = sample.batches[0]
        _check_shape(values_of(measure, model, sample.batch(first).collated), len(first))
        alone = _losses_alone(model, measure, sample)
        finite = _finite(alone, sample)
        sample, alone = sample.part(finite), alone[finite]
        for positions in sample.batches:
            batch = sample.batch(positions)
            together, again = (values_of(measure, model, batch.collated) for _ in range(2))
            _check_shape(together, len(positions))
            if not _close(together, again).all():
                raise LossError(
                    "the loss differs between two calls on the same batch: something random is active although the "
                    "model is in eval mode (F.dropout without training=self.training? noise in the loss?); make it "
                    "deterministic"
                )
            expected = alone[list(positions)]
            if not _close(together, expected).all() and not _equal_in_float64(model, measure, sample, positions):
                raise LossError(_difference(together, expected, [sample.rows[position] for position in positions]))
    return sample


@torch.no_grad()
def check_any_finite(model: nn.Module, measure: Measure, sample: Sample) -> None:
    """Raises LossError if no loss of a sample is finite: the training has diverged."""
    first_batch = sample.part(sorted(sample.batches[0]))
    _finite(values_of(measure, model, first_batch.examples.collated), first_batch)


def _finite(losses: Tensor, sample: Sample) -> list[int]:
    """Positions in the sample of the losses that are finite. Raises LossError if there are none."""
    finite: list[int] = (losses.abs() <= LARGEST_VALUE).nonzero().flatten().tolist()
    if not finite:
        try:
            check_finite(losses, "loss")
        except LossError as error:
            raise error.naming(sample.rows) from None
    return finite


def _losses_alone(model: nn.Module, measure: Measure, sample: Sample) -> Tensor:
    """The loss of each example in a batch of one. [examples of the sample]"""
    losses = []
    for position in range(len(sample.rows)):
        try:
            loss = values_of(measure, model, sample.examples.alone(position).collated)
        except Exception as error:
            raise LossError(
                f"the loss of training row {sample.rows[position]} alone fails ({type(error).__name__}: {error}): "
                "batch statistics (BatchNorm with track_running_stats=False)? Make each example's loss its own"
            ) from error
        _check_shape(loss, 1)
        losses.append(loss)
    return torch.cat(losses)


def _close(a: Tensor, b: Tensor) -> Tensor:
    """Which losses are equal up to rounding, relative to each and to their mean. bool [batch]"""
    difference, size = (a - b).double().abs(), torch.maximum(a.abs(), b.abs()).double()
    return difference <= rounding(a.dtype) * size + 1e-4 * float(size.mean())


def _equal_in_float64(model: nn.Module, measure: Measure, sample: Sample, positions: Sequence[int]) -> bool:
    """Whether losses together and alone are equal in float64, so that their difference was rounding.

    A loss near zero is a difference of larger numbers, so its rounding is large.
    """
    if sample.examples.float64:
        return False
    model_64, sample_64 = copy.deepcopy(model).double(), sample.in_float64()
    try:
        together = measure(model_64, sample_64.batch(positions).collated)
        alone = torch.cat([measure(model_64, sample_64.examples.alone(position).collated) for position in positions])
    except Exception:  # the model or the loss does not run in float64
        return False
    return together.dtype == torch.float64 and bool(_close(together, alone).all())


def _difference(together: Tensor, alone: Tensor, rows: Sequence[int]) -> str:
    """The problem of a batch whose losses are not those of its examples alone, with likely causes."""
    if bool(_close(together.sort().values, alone.sort().values).all()):
        return (
            f"the losses of a batch of training rows {_listed(rows)} come in another order than the examples: collate "
            "or forward reorders the batch (sorted by length, say); return each loss at the place of its example"
        )
    wrong = (~_close(together, alone)).nonzero().flatten().tolist()
    first = wrong[0]
    return (
        f"the loss of an example depends on the other examples of its batch: training rows "
        f"{_listed([rows[place] for place in wrong])} have other losses together than alone (row {rows[first]}: "
        f"{float(alone[first]):.6g} alone, {float(together[first]):.6g} in a batch of {len(rows)}). Likely causes: "
        "padding that is not masked, batch statistics (BatchNorm with track_running_stats=False), division by the "
        "batch size or by its tokens, a mean over the batch (reduction), outputs in another order (a sort in collate "
        "or forward), weights by the classes in the batch, mining of hard examples, in-batch negatives. Make each "
        "example's loss its own"
    )


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + " ..." * (len(rows) > 5)
