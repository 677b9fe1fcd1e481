"""What silently ruins attribution, found before it does: each problem is refused with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gradtrace.dataset import content_hash, fetch
from gradtrace.errors import DatasetError, LossError
from gradtrace.precision import LARGEST_VALUE
from gradtrace.task import Task

_TWICE_READ = 16  # rows that are read twice, to see whether they stay the same


def rounding(dtype: torch.dtype) -> float:
    """Relative difference between two ways of computing the same thing that rounding explains."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def check_losses(losses: Tensor, batch: int | None) -> None:
    """Refuse losses that are no finite number per example.

    Raises:
        LossError: wrong shape, dtype, or NaN or infinite values.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or (batch is not None and losses.shape[0] != batch):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"the loss has shape {shape} where one number per example is needed, [{batch or 'batch'}]: "
            'do not reduce it; in PyTorch losses, pass reduction="none" (then average over tokens or outputs, if any, '
            "but not over the batch)"
        )
    if not losses.is_floating_point():
        raise LossError(f"the loss has dtype {losses.dtype}; a floating-point number per example is needed")
    check_finite(losses, "loss")


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
        DatasetError
    """
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


def check_loss_function(task: Task, model: Any, examples: Sequence[Any], to_batch: Any) -> None:
    """Refuse losses that are reduced, random, or depend on the other examples of the batch.

    Raises:
        LossError
    """
    with torch.no_grad():
        batch = to_batch(examples)
        together = task.loss(model, batch)
        check_losses(together, len(examples))
        again = task.loss(model, batch)
        if not _close(together, again):
            raise LossError(
                "the loss differs between two calls on the same batch: something random is active although the model "
                "is in eval mode (F.dropout without training=self.training? noise in the loss?); make it deterministic"
            )
        for position, example in enumerate(examples):
            alone = _loss_alone(task, model, to_batch([example]), len(examples))
            check_losses(alone, 1)
            if not _close(alone[0], together[position]):
                raise LossError(
                    f"the loss of an example depends on the other examples of its batch ({float(alone[0]):.6g} alone, "
                    f"{float(together[position]):.6g} in a batch of {len(examples)}): batch statistics (BatchNorm with "
                    "track_running_stats=False), division by the batch size, in-batch negatives or padding that is not "
                    "masked; make each example's loss its own"
                )


def _loss_alone(task: Task, model: Any, batch: Any, others: int) -> Tensor:
    try:
        return task.loss(model, batch)
    except Exception as error:
        raise LossError(
            f"the loss of an example alone fails ({error}), that of a batch of {others} does not: batch statistics "
            "(BatchNorm with track_running_stats=False)? Make each example's loss its own"
        ) from error


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a.float(), b.float(), rtol=rounding(a.dtype), atol=1e-5))
