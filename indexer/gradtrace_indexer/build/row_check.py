"""Checks before an index is published: a few rows of every new shard are recomputed alone, by plain autograd.

A model is examined on a sample of rows before it is used. What only other rows show (a branch that few take, a loss
that depends on the batch) would be written without an error; this check may still find it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.data.batches import ExampleBatch, collate
from gradtrace.data.dataset import fetch
from gradtrace.errors import LossError
from gradtrace.gradients.reference import autograd_gradients
from gradtrace.layers import real_values
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.store import SparseStore, index_rows
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.sparse.vectors import Entries
from gradtrace.store.manifest import Manifest, ShardEntry, weights_positions
from gradtrace.store.precision import decode, encode
from gradtrace.store.row_ids import Ids
from gradtrace.store.rows import RowStore
from gradtrace.store.stored_rows import StoredRows
from gradtrace_indexer.build.bad_rows import usable_ids
from gradtrace_indexer.build.row_kinds import DenseRows

_ROWS = 3  # of each shard
_RELATIVE = 5e-3  # of a row's norm: rounding of the gradients
_OF_SHARD = 1e-4  # of the shard's largest norm: rounding of rows whose loss is nearly zero
_NOISE = 20  # times what float32 changes in the row itself


def check_new_rows(
    directory: Path, at: Manifest, number: int, kind: DenseRows | StrongestOfEach, model: GradientModel
) -> None:
    """Compare rows of every new shard at one checkpoint with the gradients of their examples alone.

    at: the unfinished generation as if it had this checkpoint alone, with all shards
    number: of the checkpoint in the generation;  model: at it

    Raises:
        LossError: rows differ; the text names them.
    """
    store = index_rows(directory, at)
    check: _DenseCheck | _SparseCheck
    if isinstance(kind, StrongestOfEach):
        assert isinstance(store, SparseStore)
        check = _SparseCheck(model, store, kind)
    else:
        assert isinstance(store, RowStore)
        check = _DenseCheck(model, store, kind.basis, store.column_scales([0]))
    usable = usable_ids(store.row_ids.live_ids(), at)
    for shard in (shard for shard in at.shards if is_new(shard, at)):
        draw = np.random.default_rng([number, shard.start])
        positions = shard.start + np.sort(draw.permutation(shard.stop - shard.start)[:_ROWS])
        positions = positions[np.isin(store.row_ids.ids[positions], usable)]
        differing = check.differing(positions, slice(shard.start, shard.stop))
        if differing:
            raise LossError(_message(at.checkpoints[0].name, differing))


def is_new(shard: ShardEntry, manifest: Manifest) -> bool:
    """Whether a generation's shard was written for it."""
    return shard.rows.path.endswith(f".{manifest.generation}.rows")


def zero_rows_message(store: StoredRows, manifest: Manifest) -> str | None:
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
class _DenseCheck:
    model: GradientModel
    store: RowStore  # of one checkpoint
    basis: Basis
    column_scales: Tensor | None  # [1, dimensions]

    def differing(self, positions: Ids, shard: slice) -> list[int]:
        """The training rows among these stored ones of a shard that are not what their gradients alone give."""
        stored = self.store.gather([0], positions)[:, 0]
        slack = _OF_SHARD * float(self.store.norms(0)[shard].max())
        rows = zip(self.store.row_ids.ids[positions].tolist(), stored, strict=True)
        return [row for row, vector in rows if not _agrees(self.model, row, partial(self._near, vector, slack))]

    def _near(self, stored: Tensor, slack: float, model: GradientModel, example: ExampleBatch) -> _Nearness:
        exact = model.encode_by_autograd(self.basis, example, model.task.loss)[0][0].cpu()
        scales = None if self.column_scales is None else self.column_scales[0]
        codes, scale = encode(exact[None], self.store.precision, scales)
        rounding = decode(codes, scale, scales)[0, : len(exact)] - exact
        allowed = 3 * float(rounding.norm()) + _RELATIVE * float(exact.norm()) + slack
        return _Nearness(exact, float((stored - exact).norm()), allowed)


@dataclass(frozen=True)
class _SparseCheck:
    model: GradientModel
    store: SparseStore  # of one checkpoint
    kind: StrongestOfEach

    def differing(self, positions: Ids, shard: slice) -> list[int]:
        """As those of `_DenseCheck`."""
        stored = self.store.gather(0, positions)
        squares = np.bincount(stored.places, stored.values**2, stored.n)
        slack = _OF_SHARD * float(np.sqrt(squares.max(initial=0)))
        rows = self.store.row_ids.ids[positions].tolist()
        return [
            row
            for place, row in enumerate(rows)
            if not _agrees(self.model, row, partial(self._near, stored, place, slack))
        ]

    def _near(
        self, stored: Entries, place: int, slack: float, model: GradientModel, example: ExampleBatch
    ) -> _Nearness:
        """A row may keep other coordinates than the strongest ones where these are hardly stronger."""
        names = [name for layer in model.plan.layers for name in layer.names]
        _, gradients = autograd_gradients(model.model, model.task.loss, example, names)
        present = {name: real_values(value).float() for name, value in gradients.items() if value is not None}
        by_layer = [layer.from_parameters(present).flatten() for layer in model.plan.layers]
        exact = torch.cat(by_layer).cpu() * self.kind.whitening.cpu()
        of_row = stored.places == place
        kept = torch.from_numpy(stored.coordinates[of_row].astype(np.int64))
        values, wanted = torch.from_numpy(stored.values[of_row]).float(), exact[kept]
        strongest = float(exact.abs().topk(min(self.kind.count, len(exact))).values.norm())
        codes, scale = encode(wanted[None], "int8")
        rounding = float((decode(codes, scale)[0] - wanted).norm())
        largest = float(values.abs().max()) if len(values) else 0.0
        left_out = max(0.0, strongest**2 - float(wanted.norm()) ** 2) ** 0.5
        rounded_to_zero = max(0, self.kind.count - len(values)) ** 0.5 * largest / 254
        off = float((values - wanted).norm()) - 3 * rounding
        distance = max(off, left_out - 2 * rounded_to_zero)
        return _Nearness(exact, distance, _RELATIVE * strongest + slack)


@dataclass(frozen=True)
class _Nearness:
    """exact: the row that an example's gradient alone gives;  distance: from the stored row;  allowed: of it"""

    exact: Tensor
    distance: float
    allowed: float


def _agrees(model: GradientModel, row: int, near: Callable[[GradientModel, ExampleBatch], _Nearness]) -> bool:
    """Whether a stored row is what the example's gradient alone gives, if need be in float64."""
    try:
        single = near(model, _alone(model, row))
    except LossError:
        return True  # a bad row: marked where that was asked for, else the build has ended before
    if single.distance <= single.allowed:
        return True
    try:
        in_double = copy.copy(model)
        in_double.model = copy.deepcopy(model.model).double()
        double = near(in_double, _alone(model, row, double=True))
    except Exception:  # the model or the loss is made for its own precision
        return False
    noise = float((double.exact - single.exact).norm())  # losses near zero are differences of larger numbers
    return double.distance <= double.allowed + _NOISE * noise


def _alone(model: GradientModel, row: int, double: bool = False) -> ExampleBatch:
    return collate(model.task, fetch(model.task.train, [row]), model.device, double)
