"""TRAK: influence in a linearisation of the network around each checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.fitted.trak_kernels import output_weights, stored_weights
from gradtrace.methods.gradient_scoring import GradientScoring, SelfProducts
from gradtrace.methods.method import Method, MethodOptions, chosen_checkpoints
from gradtrace.methods.position_scores import Lengths
from gradtrace.models.task_model import MeasureName
from gradtrace.store.manifest import CheckpointEntry, Manifest
from gradtrace.task import Example


class Trak(Method):
    """TRAK, Park et al. 2023, Equations 13 to 17: mean over models of phi(q)^T (Phi^T Phi)^-1 phi(z) (1 - p_z).

    phi: compressed gradient of the model's output f = log(p / (1 - p)), p the probability of the label. A stored row is
    the gradient of -log p, which is -(1 - p_z) phi(z). So is a query's gradient of the loss, which is divided by its
    1 - p_q; a measurement is taken for -f. `fitted.trak_kernels.output_weights` does the same for values.

    Equation 17 averages phi(q)^T (Phi^T Phi)^-1 phi(z) and 1 - p_z over the models separately. Stored rows hold their
    product, which is averaged here, divided by the root mean square of 1 - p at each checkpoint, so that early ones do
    not outweigh the others. For one model both are the same.
    """

    name = "trak"
    options = ("checkpoints",)
    forecasts = True
    meaning = (
        "Score: how much better the model's output (the log odds of the label, the value, or the task's measurement) "
        "is for the row, to scale, if the network were linear around the checkpoint; the mean over checkpoints"
    )

    def lacks(self, manifest: Manifest) -> str | None:
        if manifest.basis.is_sparse:
            return "its rows are sparse, and TRAK's kernel needs the same coordinates of all: build with rows='dense'"
        lacking = manifest.lacking_kernels()
        if not lacking:
            return None
        when = "as after every change of its rows or checkpoints"
        return f"it has no kernel of {lacking[0]}: run `gradtrace kernels` on it, {when}"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries = contents.manifest.checkpoints
        return _TrakScoring(contents, chosen_checkpoints(entries, options, list(contents.kernels)))


class _TrakScoring(GradientScoring):
    def __init__(self, contents: IndexContents, blocks: list[int]) -> None:
        assert contents.manifest.kernels is not None  # else `lacks` refused
        self._output, self._kernels = contents.manifest.kernels.output, [contents.kernels[block] for block in blocks]
        sizes = 1 / torch.tensor([kernel.weight for kernel in self._kernels])
        factors = run_means(contents.manifest.checkpoints, blocks) * sizes / sizes.mean()
        super().__init__(contents, blocks, factors[:, None])

    def encode(self, checkpoint: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        """phi(q): the gradient of the output, from that of the loss."""
        rows, values = super().encode(checkpoint, batch, measure)
        return self._of_output(rows, values, checkpoint, measure), values

    def encode_positions(
        self, checkpoint: int, example: Example, lengths: Lengths, measure: MeasureName
    ) -> tuple[Tensor, Tensor]:
        rows, value = super().encode_positions(checkpoint, example, lengths, measure)
        return self._of_output(rows, value, checkpoint, measure), value

    def _of_output(self, rows: Tensor, values: Tensor, checkpoint: int, measure: MeasureName) -> Tensor:
        """The gradients of the output, from those of what is measured.  values: [len(rows)] or [1]"""
        if measure != "loss":
            return rows
        least = self._kernels[self.blocks.index(checkpoint)].smallest_weight
        return rows / output_weights(values, self._output, least)[:, None]

    def reweighted(self, coordinates: Tensor) -> Tensor:
        """phi(q)^T (Phi^T Phi)^-1 at each checkpoint, times its factor."""
        return super().reweighted(_times_inverses(coordinates, [kernel.inverse for kernel in self._kernels]))

    def self_products(self, asked: Sequence[int], scored: Sequence[int]) -> SelfProducts:
        inverses = [kernel.inverse for kernel in self._kernels]
        return _SelfProducts(asked, scored, self.factors, inverses, self._row_weights)

    @cached_property
    def _row_weights(self) -> Tensor:
        """1 - p_z. float32 [stored rows, blocks]."""
        blocks = zip(self.blocks, self._kernels, strict=True)
        weights = [stored_weights(self.store, block, self._output, kernel.smallest_weight) for block, kernel in blocks]
        return torch.stack(weights, dim=1)


@dataclass(frozen=True, eq=False)
class _SelfProducts(SelfProducts):
    """inverses: of the kernels, [dimensions, dimensions] at each block;  weights: 1 - p_z, [stored rows, blocks]"""

    inverses: Sequence[Tensor]
    weights: Tensor

    def queries(self, start: int, rows: Tensor) -> Tensor:
        """From -phi(z), which is the stored -(1 - p_z) phi(z) divided."""
        weights = self.weights[start : start + len(rows), :, None].to(rows.device)
        return super().queries(start, _times_inverses(rows / weights, self.inverses))

    def of_rows(self, start: int, stop: int) -> _SelfProducts:
        inverses = [inverse.cpu() for inverse in self.inverses]
        return replace(self, factors=self.factors.cpu(), inverses=inverses, weights=self.weights[start:stop].clone())


def _times_inverses(coordinates: Tensor, inverses: Sequence[Tensor]) -> Tensor:
    """coordinates: [n, blocks, dimensions]"""
    blocks = zip(coordinates.unbind(1), inverses, strict=True)
    return torch.stack([phi @ inverse for phi, inverse in blocks], dim=1)


def run_means(entries: Sequence[CheckpointEntry], chosen: Sequence[int]) -> Tensor:
    """Weights of checkpoints for the mean over runs of the mean over each run's checkpoints. float32 [len(chosen)]."""
    counts = Counter(entries[position].run for position in chosen)
    return torch.tensor([1 / (len(counts) * counts[entries[position].run]) for position in chosen])
