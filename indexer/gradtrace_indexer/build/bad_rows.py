"""Rows that cannot be indexed: unreadable, or with a loss or gradient that is NaN or infinite.

Where a build skips them they keep their numbers, their stored rows are zeros, and they are published as deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradtrace.basis import two_sided_basis
from gradtrace.checkpoints.checkpoint import Checkpoint, load_into
from gradtrace.data.batches import collate
from gradtrace.errors import DatasetError, LossError
from gradtrace.fingerprint import without_probes
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.task_model import fresh_model
from gradtrace.store.manifest import Manifest
from gradtrace.store.precision import LARGEST_VALUE
from gradtrace.store.row_ids import Ids, read_row_ids
from gradtrace.task import Example, Task
from gradtrace_indexer.build.row_reader import RowReader, Unreadable
from gradtrace_indexer.writing.files import write_ids

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SCREENED_TOGETHER = 128
_TOLD = 10  # rows
_REASON = 200  # characters that are kept of a reason
_MOST = 0.5  # share of a shard's rows that may be bad: beyond it is not the rows that are at fault


class BadRows:
    """Numbers of bad rows with the reasons: those known before, and, where skipping is on, those that are met.

    found: the latter alone
    """

    def __init__(self, known: Mapping[int, str], skipping: bool) -> None:
        self._known, self.skipping = known, skipping
        self.found: dict[int, str] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._known or row in self.found

    def readable(self, rows: Sequence[int], read: Sequence[Example | Unreadable]) -> tuple[list[int], list[Example]]:
        """The rows, with their examples, of a batch that could be read.

        Raises:
            DatasetError: one could not, and bad rows are not skipped.
        """
        for row, example in zip(rows, read, strict=True):
            if isinstance(example, Unreadable):
                if not self.skipping:
                    raise DatasetError(example.reason)
                self.found[row] = example.reason[:_REASON]
        good = [(row, example) for row, example in zip(rows, read, strict=True) if row not in self.found]
        return [row for row, _ in good], [example for _, example in good]

    def without_finite_gradient(self, rows: Sequence[int], checkpoint: str) -> None:
        self.found |= dict.fromkeys(rows, f"its loss or gradient is NaN or infinite at {checkpoint}")

    def refuse_many(self, rows: int) -> None:
        """Raises LossError if more than half of so many rows were found to be bad."""
        if len(self.found) > _MOST * rows:
            number, reason = next(iter(self.found.items()))
            raise LossError(
                f"{len(self.found)} of {rows} rows are bad (row {number}: {reason}): too many to be skipped; check the "
                "data, and the checkpoint for divergence"
            )


def usable_ids(live: Ids, manifest: Manifest) -> Ids:
    """Of the live rows of a generation in the making, those that were not found to be bad meanwhile."""
    return np.setdiff1d(live, np.array(list(manifest.skipped), dtype=np.int64))


def with_skipped_deleted(directory: Path, manifest: Manifest) -> Manifest:
    """The generation with all its bad rows among the deleted ones; logs those that are new."""
    deleted = read_row_ids(directory, manifest).deleted
    new = sorted({*manifest.skipped} - {*deleted.tolist()})
    if not new:
        return manifest
    for line in told(manifest, new):
        _log.warning("%s: %s", directory, line)
    entry = write_ids(directory, f"deleted/{manifest.generation}.ids", np.union1d(deleted, np.array(new)))
    return manifest.model_copy(update={"deleted": entry, "task": without_probes(manifest.task, new)})


def told(manifest: Manifest, rows: Sequence[int]) -> Iterator[str]:
    """In a few lines which rows are not indexed, and why."""
    yield f"{len(rows)} row(s) are not indexed and will not be found, as deleted rows are not:"
    for row in rows[:_TOLD]:
        yield f"  row {row}: {manifest.skipped[row]}"
    if len(rows) > _TOLD:
        yield f"  and {len(rows) - _TOLD} more: `skipped` in the manifest has them all"


def finite_part(encode: Callable[[list[Example]], T], examples: Sequence[Example]) -> tuple[T | None, list[int]]:
    """What `encode` gives for the examples without those whose loss or gradient is NaN or infinite, and the positions
    of the others. None where none is left.

    Raises:
        LossError: the loss is wrong, and no example is to blame.
    """
    kept = list(range(len(examples)))
    while kept:
        try:
            return encode([examples[position] for position in kept]), kept
        except LossError as error:
            if not error.positions:
                raise
            bad = set(error.positions)
            kept = [position for place, position in enumerate(kept) if place not in bad]
    return None, []


class Screening:
    """Takes the bad ones out of some rows: what a build looks at before it writes rows is chosen among the others.

    Raises:
        LossError: more than half of them are bad.
    """

    def __init__(self, task: Task, reader: RowReader, rows: Sequence[int], bad: BadRows) -> None:
        self._task, self._bad, self._count = task, bad, len(rows)
        parts = [rows[start : start + _SCREENED_TOGETHER] for start in range(0, len(rows), _SCREENED_TOGETHER)]
        self._batches = [bad.readable(part, read) for part, read in zip(parts, reader.batches(parts), strict=True)]

    @property
    def good(self) -> list[int]:
        """Numbers of the rows that are left."""
        return [row for rows, _ in self._batches for row in rows]

    def by_losses(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Without anything that is made for gradients, which itself needs good rows to be tried on."""
        model = fresh_model(self._task, next((examples for _, examples in self._batches if examples), []))
        load_into(model, checkpoint)
        model.eval().to(device)
        self._keep(lambda examples: self._finite(model, examples, device), checkpoint.name)

    def by_gradients(self, model: GradientModel) -> None:
        """By coordinates in a few random directions, which are finite where the gradient is."""
        layers = model.plan.layers
        basis = two_sided_basis(layers, len(layers), seed=0).to(model.device)
        self._keep(
            lambda examples: finite_part(lambda some: model.encode(basis, model.batch(some)), examples)[1],
            model.checkpoint.name,
        )

    def _keep(self, kept: Callable[[list[Example]], list[int]], checkpoint: str) -> None:
        for number, (rows, examples) in enumerate(self._batches):
            left = kept(examples) if examples else []
            self._bad.without_finite_gradient([row for at, row in enumerate(rows) if at not in set(left)], checkpoint)
            self._batches[number] = [rows[at] for at in left], [examples[at] for at in left]
        self._bad.refuse_many(self._count)

    def _finite(self, model: nn.Module, examples: list[Example], device: torch.device) -> list[int]:
        with torch.no_grad():
            losses = self._task.loss(model, collate(self._task, examples, device).collated)
        if not isinstance(losses, Tensor) or losses.shape != (len(examples),):
            return list(range(len(examples)))  # it is refused in other words where gradients are taken
        finite: list[int] = (losses.abs() <= LARGEST_VALUE).nonzero().flatten().tolist()
        return finite
