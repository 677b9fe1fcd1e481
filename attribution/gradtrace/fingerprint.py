"""How an index recognises its task: by structure, by content of sampled rows, and by their losses."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import nn

from gradtrace.dataset import content_hash
from gradtrace.encoder import GradientModel
from gradtrace.errors import MismatchError
from gradtrace.manifest import Probe, TaskEntry
from gradtrace.task import Task

_PROBE_ROWS = 32
_LOSS_TOLERANCE = 1e-3  # relative to the largest probed loss: what other devices and libraries may change
_LOSS_ROUNDING = 1e-5  # of cross-entropies near zero: differences of logits


def task_entry(task: Task, model: GradientModel) -> TaskEntry:
    """The identity of a task; `model` carries the weights of the last checkpoint."""
    rows = _probe_rows(len(task.train))
    examples = [task.train[row] for row in rows]
    probe = Probe(
        rows=rows,
        sha256=[content_hash(example) for example in examples],
        losses=model.losses(model.batch(examples)).tolist(),
    )
    return TaskEntry(
        name=type(task).__name__,
        train_rows=len(task.train),
        parameters_sha256=_parameters(model.model),
        architecture_sha256=_sha256(repr(model.model).encode()),
        probe=probe,
    )


def check_task(task: Task, entry: TaskEntry) -> None:
    """Compare everything that needs no weights.

    Raises:
        MismatchError: names what differs.
    """
    if len(task.train) != entry.train_rows:
        raise MismatchError(
            f"the index was built from {entry.train_rows} training rows, task.train has {len(task.train)}: "
            "open it with the data set it was built from, or rebuild it"
        )
    model = task.model()
    if _parameters(model) != entry.parameters_sha256:
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
    """Compare the losses of sampled rows at the last checkpoint: catches a changed loss or forward pass.

    Raises:
        MismatchError: names the row.
    """
    found = model.losses(model.batch([task.train[row] for row in entry.probe.rows])).tolist()
    tolerance = _LOSS_TOLERANCE * max(map(abs, entry.probe.losses)) + _LOSS_ROUNDING
    for row, now, then in zip(entry.probe.rows, found, entry.probe.losses, strict=True):
        if abs(now - then) > tolerance:
            raise MismatchError(
                f"the loss of task.train[{row}] at the last checkpoint is {now:.6g} and was {then:.6g} when the index "
                "was built: the loss function or the model's forward pass was changed; restore it or rebuild the index"
            )


def _probe_rows(rows: int) -> list[int]:
    spread = np.linspace(0, rows - 1, min(rows, _PROBE_ROWS)).round().astype(int)
    return [int(row) for row in np.unique(spread)]


def _parameters(model: nn.Module) -> str:
    described = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    return _sha256("\n".join(described).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
