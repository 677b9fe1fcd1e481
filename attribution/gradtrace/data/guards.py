"""What silently ruins attribution, found before it does: each problem is refused with its remedy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from gradtrace.data.batches import Measure, values_of
from gradtrace.data.dataset import content_hash, fetch
from gradtrace.data.sample import Sample
from gradtrace.errors import DatasetError, LossError, TaskError
from gradtrace.store.precision import LARGEST_VALUE
from gradtrace.task import Task

_TWICE_READ = 16  # rows that are read twice, to see whether they stay the same


def rounding(dtype: torch.dtype) -> float:
    """Relative difference between two ways of computing the same thing that rounding explains."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def check_losses(losses: Tensor, batch: int | None) -> None:
    """Refuse losses that are not one finite number per example.

    Raises:
        LossError: wrong shape, dtype, or NaN or infinite values.
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
    """Raises LossError if a value, or a row of values, is NaN or infinite, or too large to be stored.

    values: [batch] or [batch, n].
    """
    if values.numel() and not float(torch.linalg.vector_norm(values.detach(), torch.inf)) <= LARGEST_VALUE:  # or NaN
        finite = values.abs() <= LARGEST_VALUE
        bad = (~finite).reshape(len(values), -1).any(1).nonzero().flatten().tolist()
        raise LossError(
            f"the {what} of {len(bad)} example(s) is NaN or infinite, or above {LARGEST_VALUE:.0e} (positions {bad[:5]}"
            " of the batch): check these examples for missing values, the checkpoint for divergence, and the loss for "
            "log(0) and for roots of zero",
            bad,
        )


def check_dataset(task: Task, skip_unreadable: bool = False) -> int:
    """Refuse a loader, a stream, an empty or a random data set. Returns the number of rows.

    skip_unreadable: pass over rows that cannot be read, of an index that knows of them

    Raises:
        DatasetError: as said.
        TaskError: the task is no Task.
    """
    if not isinstance(task, Task):
        remedy = f"pass an instance, {task.__name__}()" if isinstance(task, type) else "subclass gradtrace.Task"
        raise TaskError(f"the task is {_described(task)}, no gradtrace.Task: {remedy}")
    train = getattr(task, "train", None)
    if isinstance(train, DataLoader):
        raise DatasetError(
            "task.train is a DataLoader; pass its data set (loader.dataset): rows must keep their numbers"
        )
    if (
        train is None
        or isinstance(train, IterableDataset | Mapping)
        or not (hasattr(train, "__len__") and hasattr(train, "__getitem__"))
    ):
        raise DatasetError("task.train must be a map-style data set: len(train) and train[i]")
    if len(train) == 0:
        raise DatasetError("task.train is empty")
    for row in sorted({len(train) * part // _TWICE_READ for part in range(_TWICE_READ)}):
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


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


def check_batched_losses(model: nn.Module, measure: Measure, sample: Sample) -> Sample:
    """Refuse losses that are reduced, random, or depend on the other examples of the batch.

    Returns the sample without examples whose losses are NaN or infinite: what is done with these is not decided here.

    Raises:
        LossError: also where no loss is finite.
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
            if not _close(together, expected).all() and not _equal_in_double(model, measure, sample, positions):
                raise LossError(_difference(together, expected, [sample.rows[position] for position in positions]))
    return sample


@torch.no_grad()
def check_some_finite(model: nn.Module, measure: Measure, sample: Sample) -> None:
    """Raises LossError where no loss of a sample is finite: the training has diverged."""
    tried = sample.part(sorted(sample.batches[0]))
    _finite(values_of(measure, model, tried.examples.collated), tried)


def _finite(losses: Tensor, sample: Sample) -> list[int]:
    """Positions of finite losses in the sample."""
    finite: list[int] = (losses.abs() <= LARGEST_VALUE).nonzero().flatten().tolist()
    if not finite:
        try:
            check_finite(losses, "loss")
        except LossError as error:
            raise error.naming(sample.rows) from None
    return finite


def _losses_alone(model: nn.Module, measure: Measure, sample: Sample) -> Tensor:
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
    """Equal but for rounding, relative to the losses at hand. bool [batch]"""
    difference, size = (a - b).double().abs(), torch.maximum(a.abs(), b.abs()).double()
    return difference <= rounding(a.dtype) * size + 1e-4 * float(size.mean())


def _equal_in_double(model: nn.Module, measure: Measure, sample: Sample, positions: Sequence[int]) -> bool:
    """Whether a difference was rounding: of losses near zero, each is a difference of larger numbers."""
    if sample.examples.double:
        return False
    exact, wide = copy.deepcopy(model).double(), sample.in_double()
    try:
        together = measure(exact, wide.batch(positions).collated)
        alone = torch.cat([measure(exact, wide.examples.alone(position).collated) for position in positions])
    except Exception:  # made for its own precision
        return False
    return together.dtype == torch.float64 and bool(_close(together, alone).all())


def _difference(together: Tensor, alone: Tensor, rows: Sequence[int]) -> str:
    """What is wrong with a batch whose losses are not those of its examples alone."""
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
