"""TRAK: influence in a linear model of the network around each checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.fitted.trak_kernels import output_weights, stored_weights
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Floats, Method, chosen_checkpoints
from gradtrace.methods.options import MethodOptions
from gradtrace.models.task_model import MeasureName
from gradtrace.store.manifest import CheckpointEntry, KernelsEntry, Manifest

_BLOCK_ROWS = 4096


class Trak(Method):
    """TRAK, Park et al. 2023, Equations 13 to 17: mean over models of phi(q)^T (Phi^T Phi)^-1 phi(z) (1 - p_z).

    phi: compressed gradient of the model's output f = log(p / (1 - p)), p the probability of the label. A stored row is
    the gradient of -log p, which is -(1 - p_z) phi(z); so is a query's, whose factor 1 - p_q is known and divided out,
    unless it is another measurement that is explained, taken for -f. For values, see `kernels.output_weights`.

    Equation 17 averages phi(q)^T (Phi^T Phi)^-1 phi(z) and 1 - p_z over the models one by one. Rows hold their product,
    which is averaged here, divided by the typical 1 - p of each checkpoint, so that early ones do not outweigh the
    others. For one model it is the same.
    """

    name = "trak"
    options = ("checkpoints",)
    forecasts = True

    def lacks(self, manifest: Manifest) -> str | None:
        lacking = manifest.lacking_kernels()
        if not lacking:
            return None
        when = "as after every change of its rows or checkpoints"
        return f"it has no kernel of {lacking[0]}: run `gradtrace kernels` on it, {when}"

    def meaning(self, options: MethodOptions) -> str:
        return (
            "Score: how much better the model's output (the log odds of the label, the value, or the task's "
            "measurement) is for the row, to scale, if the network were linear around the checkpoint; the mean over "
            "checkpoints"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries, kernels = contents.manifest.checkpoints, contents.manifest.kernels
        assert kernels is not None  # else `lacks` refused
        chosen = chosen_checkpoints(entries, options.get("checkpoints"), list(contents.kernels))
        return _TrakScoring(contents, kernels, chosen)


class _TrakScoring(GradientScoring):
    def __init__(self, contents: IndexContents, entry: KernelsEntry, blocks: list[int]) -> None:
        self._output, self._kernels = entry.output, [contents.kernels[block] for block in blocks]
        sizes = 1 / torch.tensor([kernel.weight for kernel in self._kernels])
        factors = run_means(contents.manifest.checkpoints, blocks) * sizes / sizes.mean()
        super().__init__(contents, blocks, factors[:, None])

    def encode(self, at: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        """Of the loss's gradient, its part that is the output's."""
        rows, values = super().encode(at, batch, measure)
        if measure == "loss":
            least = self._kernels[self.blocks.index(at)].smallest_weight
            rows = rows / output_weights(values, self._output, least)[:, None]
        return rows, values

    def reweighted(self, coordinates: Tensor) -> Tensor:
        parts = zip(coordinates.unbind(1), self._kernels, strict=True)
        return super().reweighted(torch.stack([part @ kernel.inverse for part, kernel in parts], dim=1))

    def self_influence(self) -> Floats:
        scores = torch.zeros(self.store.rows)
        blocks = zip(self.blocks, self._kernels, strict=True)
        weights = [stored_weights(self.store, block, self._output, own.smallest_weight) for block, own in blocks]
        for start, rows in self.store.blocks(self.blocks, _BLOCK_ROWS):
            some = slice(start, start + len(rows))
            outputs = rows / torch.stack([own[some] for own in weights], dim=1)[:, :, None]
            vectors = self.reweighted(outputs.to(self._factors.device)).cpu()
            scores[some] = (vectors * rows).sum((1, 2))
        values: Floats = scores.numpy()
        return values


def run_means(entries: Sequence[CheckpointEntry], chosen: Sequence[int]) -> Tensor:
    """Weights of checkpoints for the mean over runs of the means over each run's own. Float32 [len(chosen)]."""
    counts = Counter(entries[position].run for position in chosen)
    return torch.tensor([1 / (len(counts) * counts[entries[position].run]) for position in chosen])
