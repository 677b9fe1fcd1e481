"""TracIn, and the inner product and cosine of gradients at the trained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Doubles, Floats, Method, chosen_checkpoints
from gradtrace.methods.options import MethodOptions
from gradtrace.store.manifest import CheckpointEntry, Manifest, by_run, trained_models, weights_positions
from gradtrace.task import Example

_NO_DIRECTION = 2.0**-100  # rows so much smaller than the largest are taken for zero: float32 holds no more of them

_MEANINGS = {
    "learning_rate": (
        "Score: sum over checkpoints of learning rate x inner product of the gradients of row and query. To first "
        "order, how much one step of SGD on the row at each checkpoint would lower what is explained, in its own unit"
    ),
    "learning_rate_steps": (
        "Score: sum over checkpoints of the learning rates of all steps since the checkpoint before, in sum, x inner "
        "product of the gradients of row and query. To first order, how much what is explained would have fallen, in "
        "its own unit, had every step of SGD been on the row alone"
    ),
    "equal": (
        "Score: sum over checkpoints of the inner product of the gradients of row and query. It has no unit of its "
        "own: compare the scores of one query with each other"
    ),
}


class _GradientProduct(Method):
    """Sums over checkpoints of inner products of the gradients of query and row."""

    options = ("checkpoints", "weights")
    default_weights = "equal"

    def lacks(self, manifest: Manifest) -> str | None:
        return None

    def meaning(self, options: MethodOptions) -> str:
        return f"{_MEANINGS[options.get('weights') or self.default_weights]}. Of several training runs, the mean"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries = contents.manifest.checkpoints
        chosen = chosen_checkpoints(entries, options.get("checkpoints"), self.default_checkpoints(entries))
        return _ProductScoring(contents, chosen, checkpoint_weights(entries, chosen, self.weights(options)))

    def weights(self, options: MethodOptions) -> str:
        return options.get("weights") or self.default_weights

    def default_checkpoints(self, entries: Sequence[CheckpointEntry]) -> list[int]:
        return trained_models(entries)


class TracIn(_GradientProduct):
    """TracInCP, Pruthi et al. 2020, Section 3.3: sum_i lr_i grad(z, theta_i) . grad(z', theta_i)."""

    name = "tracin"
    default_weights = "learning_rate"

    def default_checkpoints(self, entries: Sequence[CheckpointEntry]) -> list[int]:
        return weights_positions(entries)


class GradDot(_GradientProduct):
    """GradDot, Charpiat et al. 2019, Section 2: the inner product at the trained model."""

    name = "graddot"


class Cosine(_GradientProduct):
    """GradCos, Charpiat et al. 2019, Section 2: the cosine at the trained model."""

    name = "cosine"

    def meaning(self, options: MethodOptions) -> str:
        return "Score: cosine between the gradients of row and query, from -1 to 1"

    def weights(self, options: MethodOptions) -> str:
        if options.get("weights") not in (None, "equal"):
            raise QueryError("method 'cosine' weighs its checkpoints equally; leave weights out")
        return "equal"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        product = super().scoring(contents, options)
        return _CosineScoring(contents, product.blocks, np.ones(len(product.blocks)))


class _ProductScoring(GradientScoring):
    """weights: float64 [blocks]"""

    def __init__(self, contents: IndexContents, blocks: list[int], weights: Doubles) -> None:
        super().__init__(contents, blocks, torch.from_numpy(weights).float()[:, None])
        self.full_gradient_weights: Doubles = weights

    def row_norms(self) -> Floats:
        """[blocks, stored rows]; zero for deleted rows, which must not set the measure for the others."""
        norms = np.stack([self.store.norms(block) for block in self.blocks])
        norms[:, ~self.store.row_ids.live()] = 0
        return norms

    def self_influence(self) -> Floats:
        scores: Floats = (self.full_gradient_weights @ self.row_norms().astype(np.float64) ** 2).astype(np.float32)
        return scores


class _CosineScoring(_ProductScoring):
    normalized = True

    def reweighted(self, coordinates: Tensor) -> Tensor:
        return coordinates * inverse(coordinates.flatten(1).norm(dim=1))[:, None, None]

    def row_scale(self) -> Tensor:
        total = self._total_norms()
        return torch.where(total > _NO_DIRECTION * total.max(), inverse(total), 0).float()

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        return self.reweighted(super().row_vectors(examples))

    def self_influence(self) -> Floats:
        total = self._total_norms()
        directed: Floats = (total > _NO_DIRECTION * total.max()).float().numpy()
        return directed

    def _total_norms(self) -> Tensor:
        return torch.from_numpy(np.sqrt((self.row_norms().astype(np.float64) ** 2).sum(0)))


def checkpoint_weights(entries: Sequence[CheckpointEntry], chosen: Sequence[int], weights: str) -> Doubles:
    """The weight of each chosen checkpoint. float64 [len(chosen)].

    "learning_rate_steps" is the sum of the learning rates of all steps since the run's checkpoint before (since step 0
    for the first), so that the scores approximate the whole path of training. All are divided by the number of runs
    that the chosen checkpoints are of, so that scores are means over runs.
    """
    share = np.full(len(chosen), 1 / len(by_run(entries, chosen)))
    if weights == "equal":
        return share
    if weights == "learning_rate":
        return share * [entries[position].learning_rate for position in chosen]
    sums = np.zeros(len(entries))
    for run in by_run(entries, weights_positions(entries)):
        sums[run] = stretch_sums([entries[position] for position in run])
    return share * sums[list(chosen)]


def inverse(norms: Tensor) -> Tensor:
    """1 / norm, and 0 for zero gradients: these have no direction, so no cosine but 0."""
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
