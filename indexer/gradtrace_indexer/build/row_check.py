"""Checks before an index is published: a few rows of every new shard are recomputed alone, by plain autograd.

A model is examined on a sample of rows before it is used. What only other rows show (a branch that few take, a loss
that depends on the batch) would be written without an error; this check may still find it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.data.batches import collate
from gradtrace.data.dataset import fetch
from gradtrace.errors import LossError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import Manifest, weights_positions
from gradtrace.store.precision import decode, encode, load_column_scales
from gradtrace.store.rows import RowStore
from gradtrace_indexer.build.bad_rows import usable_ids

_ROWS = 3  # of each shard
_RELATIVE = 5e-3  # of a row's norm: rounding of the gradients
_OF_SHARD = 1e-4  # of the shard's largest norm: rounding of rows whose loss is nearly zero
_NOISE = 20  # times what float32 changes in the row itself


def check_new_rows(
    directory: Path,
    manifest: Manifest,
    checkpoint: int,
    basis: Basis,
    model_of: Callable[[Manifest, int], GradientModel],
) -> None:
    """Compare rows of every new shard at one checkpoint with the gradients of their examples alone.

    manifest: unfinished, with all shards up to this checkpoint.

    Raises:
        LossError: rows differ; the text names them.
    """
    shards = [
        shard
        for shard in manifest.shards
        if shard.checkpoint == checkpoint and shard.rows.path.endswith(f".{manifest.generation}.rows")
    ]
    if not shards:
        return
    store, entry = readable_store(directory, manifest, checkpoint), manifest.checkpoints[checkpoint]
    usable = usable_ids(store.row_ids.live_ids(), manifest)
    scales = load_column_scales(directory, manifest)
    check = _RowCheck(model_of(manifest, checkpoint), basis, manifest, scales[entry.run] if scales else None)
    for shard in shards:
        draw = np.random.default_rng([checkpoint, shard.start])
        positions = shard.start + np.sort(draw.permutation(shard.stop - shard.start)[:_ROWS])
        positions = positions[np.isin(store.row_ids.ids[positions], usable)]
        stored = store.gather([checkpoint], positions)[:, 0]
        largest = float(store.norms(checkpoint)[shard.start : shard.stop].max())
        rows = store.row_ids.ids[positions].tolist()
        differing = [row for row, vector in zip(rows, stored, strict=True) if not check.agrees(row, vector, largest)]
        if differing:
            raise LossError(_message(entry.name, differing))


def readable_store(directory: Path, manifest: Manifest, checkpoint: int) -> RowStore:
    """The rows of an unfinished generation up to this checkpoint."""
    update = {"checkpoints": manifest.checkpoints[: checkpoint + 1]}
    return RowStore(directory, manifest.model_copy(update=update))


def zero_rows_message(store: RowStore, manifest: Manifest) -> str | None:
    """The likely causes where every row's gradient is zero at every checkpoint; else None. Reads only stored norms."""
    count, positions = len(store.row_ids.ids), weights_positions(manifest.checkpoints)
    if not count or any(np.any(store.norms(position)) for position in positions):
        return None
    return (
        f"the gradients of all {count:,} training rows are zero at every checkpoint, so every score will be zero: the "
        "loss may be saturated (exactly 0 in float32: take it in float64, or an earlier checkpoint), or it does not "
        "depend on the trainable parameters"
    )


def _message(checkpoint: str, rows: Sequence[int]) -> str:
    return (
        f"training row(s) {', '.join(map(str, rows))} have another gradient in a batch than alone, at checkpoint "
        f"{checkpoint}: nothing is published. Likely causes: a loss or a layer that looks at the other examples of the "
        "batch in cases that the first sample of rows did not show (padding that is not masked, weights or mining by "
        "the batch, routing with a capacity), or a model or task that keeps a state between calls. Make each example's "
        "loss its own, then build again; `gradtrace discard` removes what was written"
    )


@dataclass(frozen=True)
class _RowCheck:
    model: GradientModel
    basis: Basis
    manifest: Manifest
    column_scales: Tensor | None

    def agrees(self, row: int, stored: Tensor, largest: float) -> bool:
        """Whether a stored row [dimensions] is what the example's gradient alone gives."""
        try:
            exact = self._row(row)
        except LossError:
            return True  # a bad row: marked where that was asked for, else the build has ended before
        if self._near(stored, exact, _OF_SHARD * largest):
            return True
        try:
            exacter = self._row(row, double=True)
        except Exception:  # the model or the loss is made for its own precision
            return False
        noise = float((exacter - exact).norm())  # losses near zero are differences of larger numbers
        return self._near(stored, exacter, _OF_SHARD * largest + _NOISE * noise)

    def _near(self, stored: Tensor, exact: Tensor, slack: float) -> bool:
        codes, scale = encode(exact[None], self.manifest.precision, self.column_scales)
        rounding = decode(codes, scale, self.column_scales)[0, : len(exact)] - exact
        allowed = 3 * float(rounding.norm()) + _RELATIVE * float(exact.norm()) + slack
        return float((stored - exact).norm()) <= allowed

    def _row(self, row: int, double: bool = False) -> Tensor:
        """float32 [dimensions], computed in float64 if `double`."""
        model = self.model
        if double:
            model = copy.copy(model)
            model.model = copy.deepcopy(model.model).double()
        example = collate(model.task, fetch(model.task.train, [row]), model.device, double)
        return model.encode_by_autograd(self.basis, example, model.task.loss)[0][0].cpu()
