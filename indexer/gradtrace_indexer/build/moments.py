"""The second moments that a Gauss-Newton basis is rotated by, as a sum over stretches of the training rows.

Stretches are of the rows alone, and their sums are added in their order: the result does not depend on who computes
which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.fitted.gauss_newton import SecondMoments
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import FisherEntry
from gradtrace.store.row_ids import Ids
from gradtrace_indexer.build.bad_rows import BadRows
from gradtrace_indexer.build.builder import Builder
from gradtrace_indexer.build.row_kinds import DenseRows
from gradtrace_indexer.build.rows import encoded_batches

_DRAWN_ROWS = 1 << 40  # first of the streams of random numbers that draw rows
_FEWEST_ROWS = 16_384  # of a stretch, beside which its matrix costs little
_FEW_STRETCHES = 8  # whose matrices lie on disk for each checkpoint where workers share them; more of many rows
_ROWS_PER_MORE = 1_000_000


class PartialSum(NamedTuple):
    """Of w g gT over some rows, float32 [coordinates, coordinates], and how many rows these are."""

    total: Tensor
    rows: int


class MomentSums:
    """The sums at the checkpoints of a training run, in the coordinates of its spectral basis.

    rows: those that the basis is fitted to
    """

    def __init__(self, builder: Builder, basis: Basis, rows: Ids, fisher: FisherEntry) -> None:
        self._builder, self._rows, self._fisher = builder, rows, fisher
        self.basis = basis.to(builder.device)

    def stretches(self) -> list[tuple[int, int]]:
        """(start, stop) of each, by positions among `rows`."""
        count = len(self._rows)
        size = max(_FEWEST_ROWS, -(-count // (_FEW_STRETCHES + count // _ROWS_PER_MORE)))
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def of_stretch(self, model: GradientModel, number: int, start: int, on_rows: Callable[[int], object]) -> PartialSum:
        """number: the checkpoint's among those of the run;  start: of one of the `stretches`"""
        builder, basis, rows = self._builder, self.basis, self._rows
        moments = SecondMoments(
            basis.dimensions, len(rows), self._fisher.output, builder.device, basis.seed, _DRAWN_ROWS + number, start
        )
        workers, bad = builder.workers(model, DenseRows(basis)), BadRows({}, builder.skip_bad_rows)
        stretch = rows[start : dict(self.stretches())[start]]
        for encoded in encoded_batches(builder.reader, workers, stretch, builder.batch_size, bad):
            moments.add(encoded.rows, encoded.losses)
            on_rows(len(encoded.losses))
        return PartialSum(moments.total(), moments.count)

    def at_checkpoints(self, models: Iterable[GradientModel], on_rows: Callable[[int], object]) -> Iterator[Tensor]:
        """K of `fitted.gauss_newton` at each of the run's checkpoints."""
        for number, model in enumerate(models):
            yield mean_moments(self.of_stretch(model, number, start, on_rows) for start, _ in self.stretches())


def mean_moments(sums: Iterable[PartialSum]) -> Tensor:
    """K, float32 [coordinates, coordinates]."""
    total, count = torch.zeros(()), 0
    for partial in sums:
        total = partial.total if not count else total.add_(partial.total)
        count += partial.rows
    return total / max(count, 1)
