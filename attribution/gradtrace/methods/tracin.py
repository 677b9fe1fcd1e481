"""TracIn, also as Adam trains, and the inner product and cosine of gradients at the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.errors import MismatchError, QueryError
from gradtrace.fitted.adam import adam_factors, encode_preconditioned, encode_preconditioned_positions
from gradtrace.fitted.curvature import Columns
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Method, MethodOptions, Scoring, chosen_checkpoints
from gradtrace.methods.norms import inverse, inverse_row_norms, live_norms, squared_norm_sums
from gradtrace.methods.position_scores import Lengths
from gradtrace.methods.sparse_scoring import SparseScoring, weights_alone
from gradtrace.models.queries import Query
from gradtrace.models.task_model import MeasureName
from gradtrace.search.scored_rows import Doubles, Floats
from gradtrace.store.manifest import CheckpointEntry, Manifest, by_run, trained_models, weights_positions
from gradtrace.task import Example

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
    along_training = False  # by default at all checkpoints; else at the trained models

    def meaning_with(self, options: MethodOptions) -> str:
        return f"{_MEANINGS[options.get('weights') or self.default_weights]}. Of several training runs, the mean"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        chosen, weights = self.weighted(contents, options)
        if contents.is_sparse:
            return SparseScoring(contents, chosen, weights_alone(weights), weights)
        return _ProductScoring(contents, chosen, weights)

    def weighted(self, contents: IndexContents, options: MethodOptions) -> tuple[list[int], Doubles]:
        """The checkpoints that are summed over, and the weight of each."""
        entries = contents.manifest.checkpoints
        default = weights_positions(entries) if self.along_training else trained_models(entries)
        chosen = chosen_checkpoints(entries, options, default)
        return chosen, checkpoint_weights(entries, chosen, options.get("weights") or self.default_weights)


class TracIn(_GradientProduct):
    """TracInCP, Pruthi et al. 2020, Section 3.3: sum_i lr_i grad(z, theta_i) . grad(z', theta_i)."""

    name = "tracin"
    default_weights = "learning_rate"
    along_training = True


class TracInAdam(TracIn):
    """sum_i lr_i <P_i grad(q, theta_i), grad(z, theta_i)>, P_i = 1 / (sqrt(v^_i) + eps) for each weight.

    TracInCP (Pruthi et al. 2020, Section 3.3) with the step of Adam (Kingma and Ba 2015, Algorithm 1) in place of that
    of SGD, with constant second moments v^ and without momentum. The query's whole gradient is multiplied by P before
    it is compressed, so that rows stay as they are.
    """

    name = "tracin-adam"

    def lacks(self, manifest: Manifest) -> str | None:
        for entry in manifest.checkpoints:
            if entry.kind == "weights" and entry.moments_sha256 is None:
                return (
                    f"checkpoint {entry.name} has no second moments of Adam's beside it: record with "
                    "CheckpointRecorder(optimizer_state=True), then build the index (`gradtrace build`)"
                )
        return None

    def meaning_with(self, options: MethodOptions) -> str:
        return (
            f"{super().meaning_with(options)}. Adam's steps stand for those of SGD: each weight's product of gradients "
            "is divided by the root of its second moment"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        chosen, weights = self.weighted(contents, options)
        if not contents.is_sparse:
            return _AdamScoring(contents, chosen, torch.from_numpy(weights).float()[:, None])

        def factors(place: int, columns: Columns) -> Tensor:
            diagonal = contents.curvature[chosen[place]].preconditioner
            assert diagonal is not None  # else `lacks` refused
            return diagonal[columns] * float(weights[place])

        return SparseScoring(contents, chosen, factors)


class GradDot(_GradientProduct):
    """GradDot, Charpiat et al. 2019, Section 2: the inner product at the trained model."""

    name = "graddot"


class Cosine(_GradientProduct):
    """GradCos, Charpiat et al. 2019, Section 2: the cosine at the trained model."""

    name = "cosine"

    def meaning_with(self, options: MethodOptions) -> str:
        return "Score: cosine between the gradients of row and query, from -1 to 1"

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        if options.get("weights") not in (None, "equal"):
            raise QueryError("method 'cosine' weighs its checkpoints equally; leave weights out")
        blocks, _ = self.weighted(contents, options)
        if contents.is_sparse:
            equal = np.ones(len(blocks))
            return SparseScoring(contents, blocks, weights_alone(equal), equal, normalized=True)
        return _CosineScoring(contents, blocks, np.ones(len(blocks)))


class _AdamScoring(GradientScoring):
    def encode(self, checkpoint: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        model, basis = self._contents.models[checkpoint], self._contents.basis_of(checkpoint).unrotated
        return encode_preconditioned(model, basis, batch, model.measure(measure), self._factors(checkpoint))

    def encode_positions(
        self, checkpoint: int, example: Example, lengths: Lengths, measure: MeasureName
    ) -> tuple[Tensor, Tensor]:
        model, basis = self._contents.models[checkpoint], self._contents.basis_of(checkpoint).unrotated
        factors = self._factors(checkpoint)
        return encode_preconditioned_positions(model, basis, example, lengths, model.measure(measure), factors)

    def _factors(self, checkpoint: int) -> Mapping[str, Tensor]:
        contents, model = self._contents, self._contents.models[checkpoint]
        if checkpoint not in contents.adam_factors:
            if model.checkpoint.moments_sha256() != contents.manifest.checkpoints[checkpoint].moments_sha256:
                raise MismatchError(
                    f"the second moments beside {model.checkpoint.path} are not those that were there when the index "
                    "was built: restore that file, or rebuild the index"
                )
            contents.adam_factors[checkpoint] = adam_factors(model)
        return contents.adam_factors[checkpoint]

    def self_influence(self) -> NoReturn:
        raise QueryError(
            "method 'tracin-adam' has no self-influence: the stored rows are compressed before Adam's second moments "
            "could divide them. Ask with the training example as a query"
        )


class _ProductScoring(GradientScoring):
    """weights: float64 [blocks]"""

    def __init__(self, contents: IndexContents, blocks: list[int], weights: Doubles) -> None:
        super().__init__(contents, blocks, torch.from_numpy(weights).float()[:, None])
        self.full_gradient_weights: Doubles = weights

    def self_influence(self) -> Floats:
        return squared_norm_sums(live_norms(self.store, self.blocks), self.full_gradient_weights)


class _CosineScoring(_ProductScoring):
    normalized = True

    def reweighted(self, coordinates: Tensor) -> Tensor:
        return coordinates * inverse(coordinates.flatten(1).norm(dim=1))[:, None, None]

    def reweighted_positions(self, coordinates: Tensor, query: Query) -> Tensor:
        whole, _ = self.query_coordinates([query])
        return coordinates * inverse(whole.norm())

    def row_scale(self) -> Tensor:
        return inverse_row_norms(live_norms(self.store, self.blocks))

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        return self.reweighted(super().row_vectors(examples))

    def self_influence(self) -> Floats:
        """1; 0 for rows without a direction. float32 [stored rows]"""
        scores: Floats = (self.row_scale() > 0).float().numpy()
        return scores


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
