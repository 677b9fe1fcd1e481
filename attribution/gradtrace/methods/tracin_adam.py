"""TracIn for models that Adam trained."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.batches import ExampleBatch
from gradtrace.errors import MismatchError, QueryError
from gradtrace.fitted.adam import adam_factors, encode_preconditioned
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import chosen_checkpoints
from gradtrace.methods.options import MethodOptions
from gradtrace.methods.tracin import TracIn, checkpoint_weights
from gradtrace.models.task_model import MeasureName
from gradtrace.store.manifest import Manifest


class TracInAdam(TracIn):
    """sum_i lr_i <P_i grad(q, theta_i), grad(z, theta_i)>, P_i = 1 / (sqrt(v^_i) + eps) for each weight.

    TracInCP (Pruthi et al. 2020, Section 3.3) with the step of Adam (Kingma and Ba 2015, Algorithm 1) in place of that
    of SGD, its second moments v^ held at what they were, without momentum. The query's whole gradient is multiplied by
    P before it is compressed, so that rows stay as they are.
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

    def meaning(self, options: MethodOptions) -> str:
        return (
            f"{super().meaning(options)}. Adam's steps stand for those of SGD: each weight's product of gradients is "
            "divided by the root of its second moment"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries = contents.manifest.checkpoints
        chosen = chosen_checkpoints(entries, options.get("checkpoints"), self.default_checkpoints(entries))
        weights = checkpoint_weights(entries, chosen, self.weights(options))
        return _AdamScoring(contents, chosen, torch.from_numpy(weights).float()[:, None])


class _AdamScoring(GradientScoring):
    def encode(self, at: int, batch: ExampleBatch, measure: MeasureName) -> tuple[Tensor, Tensor]:
        contents = self._contents
        if at not in contents.adam_factors:
            model, entry = contents.models[at], contents.manifest.checkpoints[at]
            if model.checkpoint.moments_sha256() != entry.moments_sha256:
                raise MismatchError(
                    f"the second moments beside {model.checkpoint.path} are not those that were there when the index "
                    "was built: restore that file, or rebuild the index"
                )
            contents.adam_factors[at] = adam_factors(model)
        model = contents.models[at]
        return encode_preconditioned(
            model, contents.basis_of(at), batch, model.measure(measure), contents.adam_factors[at]
        )

    def self_influence(self) -> NoReturn:
        raise QueryError(
            "method 'tracin-adam' has no self-influence: the stored rows are compressed before Adam's second moments "
            "could divide them. Ask with the training example as a query"
        )
