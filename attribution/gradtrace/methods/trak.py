"""TRAK: influence in a linear model of the network around each checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.manifest import CheckpointEntry, Manifest
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Method, chosen_checkpoints
from gradtrace.methods.options import Options


class Trak(Method):
    """TRAK, Park et al. 2023, Equations 13 to 17: mean over models of phi(q)^T (Phi^T Phi)^-1 phi(z) (1 - p_z).

    phi: compressed gradient of the model's output f = log(p / (1 - p)), p the probability of the label. A stored row is
    the gradient of -log p, which is -(1 - p_z) phi(z), and a query's gradient is that of what is explained: -phi(q) for
    a negative margin. So a query vector is (Phi^T Phi)^-1 times the query's coordinates. The products are averaged over
    the models; Equation 17 averages their two factors one by one, which is the same for one model.
    """

    name = "trak"
    options = ("checkpoints",)

    def lacks(self, manifest: Manifest) -> str | None:
        lacking = manifest.lacking_kernels()
        return f"it has no kernel of {lacking[0]}: run `gradtrace kernels` on it" if lacking else None

    def meaning(self, options: Options) -> str:
        return (
            "Score: mean over checkpoints of how much what is explained would rise, to scale, if the row were left out "
            "of the training of a linear model: the network, linearised at the checkpoint"
        )

    def scoring(self, contents: IndexContents, options: Options) -> GradientScoring:
        entries = contents.manifest.checkpoints
        chosen = chosen_checkpoints(entries, options.checkpoints, list(contents.kernels))
        foreign = [entries[position].name for position in chosen if position not in contents.kernels]
        if foreign:
            raise QueryError(f"method 'trak' has no use of {foreign[0]}: leave it out")
        return _TrakScoring(contents, chosen)


class _TrakScoring(GradientScoring):
    def __init__(self, contents: IndexContents, blocks: list[int]) -> None:
        super().__init__(contents, blocks, run_means(contents.manifest.checkpoints, blocks)[:, None])
        self._kernels = [contents.kernels[block] for block in blocks]

    def reweighted(self, coordinates: Tensor) -> Tensor:
        parts = zip(coordinates.unbind(1), self._kernels, strict=True)
        return super().reweighted(torch.stack([part @ inverse for part, inverse in parts], dim=1))


def run_means(entries: Sequence[CheckpointEntry], chosen: Sequence[int]) -> Tensor:
    """Weights of checkpoints for the mean over runs of the means over each run's own. Float32 [len(chosen)]."""
    counts = Counter(entries[position].run for position in chosen)
    return torch.tensor([1 / (len(counts) * counts[entries[position].run]) for position in chosen])
