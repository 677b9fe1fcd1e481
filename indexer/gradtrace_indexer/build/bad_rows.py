"""Rows that cannot be indexed: unreadable, or with a loss or gradient that is NaN or infinite.

A build that skips them stores zeros in their places and publishes them as deleted; all other rows keep their numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

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
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.writing.files import write_ids

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SCREENED_TOGETHER = 128
_LISTED_ROWS = 10
_REASON_CHARACTERS = 200
_LARGEST_BAD_SHARE = 0.5  # of a shard's rows; above it, the data or the checkpoint is at fault, not the rows


class BadRows:
    """Numbers of bad rows with the reasons: those known before, and, where `skipping`, those that turn up.

    new: the latter alone
    """

    def __init__(self, known: Mapping[int, str], skipping: bool) -> None:
        self._known, self.skipping = known, skipping
        self.new: dict[int, str] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._known or row in self.new

    def readable(
        self, rows: Sequence[int], examples: Sequence[Example | DatasetError]
    ) -> tuple[list[int], list[Example]]:
        """The rows of a batch that could be read, and their examples.

        Raises:
            DatasetError: one could not, and bad rows are not skipped.
        """
        for row, example in zip(rows, examples, strict=True):
            if isinstance(example, DatasetError):
                if not self.skipping:
                    raise example
                self.new[row] = str(example)[:_REASON_CHARACTERS]
        good = [(row, example) for row, example in zip(rows, examples, strict=True) if row not in self.new]
        return [row for row, _ in good], [example for _, example in good]

    def add_all_but(self, kept: Sequence[int], rows: Sequence[int], checkpoint: str) -> None:
        """Those of these rows whose loss or gradient is not finite: all but the ones at the positions `kept`."""
        bad = [row for position, row in enumerate(rows) if position not in set(kept)]
        self.new |= dict.fromkeys(bad, f"its loss or gradient is NaN or infinite at {checkpoint}")

    def refuse_many(self, rows: int) -> None:
        """Raises LossError if more than half of this number of rows turned out to be bad."""
        if len(self.new) > _LARGEST_BAD_SHARE * rows:
            number, reason = next(iter(self.new.items()))
            raise LossError(
                f"{len(self.new)} of {rows} rows are bad (row {number}: {reason}): too many to be skipped; check the "
                "data, and the checkpoint for divergence"
            )


def usable_ids(live: Ids, manifest: Manifest) -> Ids:
    """The live rows of an unfinished generation without those that it skips."""
    return np.setdiff1d(live, np.array(list(manifest.skipped), dtype=np.int64))


def with_skipped_deleted(directory: Path, manifest: Manifest) -> Manifest:
    """The generation with all its bad rows among the deleted ones; logs those that are new."""
    deleted = read_row_ids(directory, manifest).deleted
    new = sorted({*manifest.skipped} - {*deleted.tolist()})
    if not new:
        return manifest
    for line in skipped_lines(manifest, new):
        _log.warning("%s: %s", directory, line)
    entry = write_ids(directory, f"deleted/{manifest.generation}.ids", np.union1d(deleted, np.array(new)))
    return manifest.model_copy(update={"deleted": entry, "task": without_probes(manifest.task, new)})


def skipped_lines(manifest: Manifest, rows: Sequence[int]) -> Iterator[str]:
    """Which of these rows are not indexed, and why, in a few lines."""
    yield f"{len(rows)} row(s) are not indexed and will not be found, as deleted rows are not:"
    for row in rows[:_LISTED_ROWS]:
        yield f"  row {row}: {manifest.skipped[row]}"
    if len(rows) > _LISTED_ROWS:
        yield f"  and {len(rows) - _LISTED_ROWS} more: `skipped` in the manifest has them all"


def encode_finite(encode: Callable[[list[Example]], T], examples: Sequence[Example]) -> tuple[T | None, list[int]]:
    """Encode the examples whose loss and gradient are finite; returns the result and their positions. None where there
    is none.

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
    """Finds the bad ones among some rows. What a build examines before it writes rows is chosen from the good ones.

    Raises:
        LossError: more than half of them are bad.
    """

    def __init__(self, task: Task, reader: RowReader, rows: Sequence[int], bad: BadRows) -> None:
        self._task, self._bad, self._count = task, bad, len(rows)
        batches = [rows[start : start + _SCREENED_TOGETHER] for start in range(0, len(rows), _SCREENED_TOGETHER)]
        self._batches = [
            bad.readable(batch, examples) for batch, examples in zip(batches, reader.batches(batches), strict=True)
        ]

    @property
    def good(self) -> list[int]:
        """Numbers of the rows that are not bad, so far."""
        return [row for rows, _ in self._batches for row in rows]

    def by_losses(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Without a GradientModel: examining one needs good rows."""
        model = fresh_model(self._task, next((examples for _, examples in self._batches if examples), []))
        load_into(model, checkpoint)
        model.eval().to(device)

        def finite(examples: list[Example]) -> list[int]:
            with torch.no_grad():
                losses = self._task.loss(model, collate(self._task, examples, device).collated)
            if not isinstance(losses, Tensor) or losses.shape != (len(examples),):
                return list(range(len(examples)))  # refused with a better message where gradients are taken
            positions: list[int] = (losses.abs() <= LARGEST_VALUE).nonzero().flatten().tolist()
            return positions

        self._keep(finite, checkpoint.name)

    def by_gradients(self, model: GradientModel) -> None:
        """By coordinates in a few random directions, which are finite where the gradient is."""
        layers = model.plan.layers
        basis = two_sided_basis(layers, len(layers), seed=0).to(model.device)
        self._keep(
            lambda examples: encode_finite(lambda subset: model.encode(basis, model.batch(subset)), examples)[1],
            model.checkpoint.name,
        )

    def _keep(self, finite: Callable[[list[Example]], list[int]], checkpoint: str) -> None:
        for number, (rows, examples) in enumerate(self._batches):
            kept = finite(examples) if examples else []
            self._bad.add_all_but(kept, rows, checkpoint)
            self._batches[number] = [rows[at] for at in kept], [examples[at] for at in kept]
        self._bad.refuse_many(self._count)
