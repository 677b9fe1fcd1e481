"""The fingerprint of a task, by which an index recognises it: model structure, content and losses of sampled rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradtrace.data.dataset import content_hash
from gradtrace.errors import LossError, MismatchError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.task_model import fresh_model
from gradtrace.store.manifest import Probe, TaskEntry
from gradtrace.task import Example, Task

_PROBE_ROWS = 32
_BATCH = 16  # probe rows that go through the model at once, as in its examination
_LOSS_TOLERANCE = 1e-3  # relative to the largest loss of a probe row: other devices and libraries may change so much
_LOSS_ROUNDING = 1e-5  # absolute: cross-entropies near zero are differences of logits


def task_entry(task: Task, model: GradientModel, indexed: NDArray[np.int64]) -> TaskEntry:
    """The fingerprint of a task. model: at the last checkpoint.  indexed: int64 [n], rows in the index, ascending"""
    rows = indexed[_probe_positions(len(indexed))].tolist()
    examples = [task.train[row] for row in rows]
    losses = _losses(model, examples, rows)
    probe = Probe(rows=rows, sha256=[content_hash(example) for example in examples], losses=losses)
    return TaskEntry(
        name=type(task).__name__,
        train_rows=len(task.train),
        layers=None if task.layers is None else list(task.layers),
        parameters_sha256=_parameters_sha256(model.model),
        architecture_sha256=_sha256(repr(model.model).encode()),
        probe=probe,
    )


def weightless_identity(task: Task) -> dict[str, str | int]:
    """A fingerprint that needs no weights, as JSON values."""
    model = fresh_model(task, [task.train[0]])
    examples = (content_hash(task.train[row]) for row in _probe_positions(len(task.train)))
    return {
        "task": type(task).__name__,
        "train_rows": len(task.train),
        "train_examples": _sha256("".join(examples).encode()),
        "parameters": _parameters_sha256(model),
        "architecture": _sha256(repr(model).encode()),
    }


def without_probes(entry: TaskEntry, deleted: Sequence[int]) -> TaskEntry:
    """The fingerprint without probes of deleted rows, which the data set may no longer have."""
    removed, probe = set(deleted), entry.probe
    kept = [position for position, row in enumerate(probe.rows) if row not in removed]
    fields = {name: [values[position] for position in kept] for name, values in probe.model_dump().items()}
    return entry.model_copy(update={"probe": Probe(**fields)})


def check_task(task: Task, entry: TaskEntry, grown: bool = False) -> None:
    """Compare a task with a fingerprint, except for the losses. grown: the data set may have additional rows at its end

    Raises:
        MismatchError: names what differs.
    """
    rows = len(task.train)
    if rows < entry.train_rows or (rows > entry.train_rows and not grown):
        remedy = "append the new ones with `gradtrace append`" if rows > entry.train_rows else "rebuild it"
        raise MismatchError(
            f"the index was built from {entry.train_rows} training rows, task.train has {rows}: open it with the data "
            f"set it was built from, or {remedy}"
        )
    if (None if task.layers is None else list(task.layers)) != entry.layers:
        raise MismatchError(
            f"the index was built with layers = {entry.layers}, the task has {task.layers}: put them back, or rebuild "
            "the index"
        )
    model = fresh_model(task, [task.train[row] for row in entry.probe.rows[:1] or [0]])
    if _parameters_sha256(model) != entry.parameters_sha256:
        raise MismatchError(_WRONG_MODEL.format("names, shapes or types of the parameters"))
    if _sha256(repr(model).encode()) != entry.architecture_sha256:
        raise MismatchError(_WRONG_MODEL.format("layers"))
    for row, expected in zip(entry.probe.rows, entry.probe.sha256, strict=True):
        if content_hash(task.train[row]) != expected:
            raise MismatchError(
                f"task.train[{row}] is not the example that was indexed (its content hash differs): the data set was "
                "changed, reordered or preprocessed otherwise; restore it or rebuild the index"
            )


_WRONG_MODEL = (
    "task.model() is not the model that was indexed: the {} differ; use the model's code of that time or rebuild the "
    "index"
)


def check_probe_losses(task: Task, model: GradientModel, entry: TaskEntry) -> None:
    """Compare the losses of the probe rows at the last checkpoint, to detect a changed loss or forward pass.

    model: at the last checkpoint

    Raises:
        MismatchError: names the row.
    """
    losses = _losses(model, [task.train[row] for row in entry.probe.rows], entry.probe.rows)
    relative = max(_LOSS_TOLERANCE, 2 * max(map(_precision, model.model.parameters()), default=0.0))
    tolerance = relative * max(map(abs, entry.probe.losses), default=0) + _LOSS_ROUNDING
    for row, now, then in zip(entry.probe.rows, losses, entry.probe.losses, strict=True):
        if abs(now - then) > tolerance:
            raise MismatchError(
                f"the loss of task.train[{row}] at the last checkpoint is {now:.6g} and was {then:.6g} when the index "
                "was built: the loss function or the model's forward pass was changed; restore it or rebuild the index"
            )


def _precision(values: Tensor) -> float:
    """The relative distance of neighbouring numbers."""
    return torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0


def _losses(model: GradientModel, examples: Sequence[Example], rows: Sequence[int]) -> list[float]:
    """The losses of these rows, in small batches, since outputs of language models are large."""
    losses: list[float] = []
    for start in range(0, len(examples), _BATCH):
        batch = slice(start, start + _BATCH)
        try:
            losses += model.losses(model.batch(examples[batch])).tolist()
        except LossError as error:
            raise error.naming(rows[batch]) from error
    return losses


def _probe_positions(count: int) -> list[int]:
    """Up to `_PROBE_ROWS` evenly spaced positions from 0 to count - 1."""
    positions: list[int] = np.unique(np.linspace(0, count - 1, min(count, _PROBE_ROWS)).round().astype(int)).tolist()
    return positions


def _parameters_sha256(model: nn.Module) -> str:
    described = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    return _sha256("\n".join(described).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
