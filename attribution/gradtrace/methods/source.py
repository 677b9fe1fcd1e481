"""SOURCE: attribution by approximately unrolling the training, in segments of one curvature and one gradient each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.contents import IndexContents
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.methods.method import Doubles, Method, chosen_checkpoints, lacks_curvature
from gradtrace.methods.options import MethodOptions
from gradtrace.store.manifest import CheckpointEntry, CheckpointKind, Manifest, by_run, trained_models

_SEGMENTS = 3


class Source(Method):
    """SOURCE, Bae et al. 2024, Equations 16 and 20 to 22.

    With the checkpoints in L segments, each with its stationary curvature H_l, gradient g_l of a row, and K_l steps of
    mean learning rate eta_l, the score of the row for a query's gradient q is

        sum_l q . exp(-eta_L K_L H_L) ... exp(-eta_(l+1) K_(l+1) H_(l+1)) (1 - exp(-eta_l K_l H_l)) H_l^-1 g_l

    H_l is approximated as diagonal in the run's spectral basis (EK-FAC), which is fitted at one checkpoint and shared
    by all segments, where the paper fits one for each. Heavy-ball momentum divides the learning rate by 1 - momentum
    (Appendix C); weight decay adds to the curvature. Adam and its kin precondition the steps by P = 1 / (sqrt(v) + eps)
    (Appendix C), of which the diagonal in these coordinates is taken; the paper takes, for Adam, a diagonal Hessian of
    the weights in the exponentials and EK-FAC for the inverse.
    """

    name = "source"
    options: ClassVar[tuple[str, ...]] = ("checkpoints", "segments")
    forecasts = True
    uses_curvature = True
    kind: ClassVar[CheckpointKind] = "weights"

    def lacks(self, manifest: Manifest) -> str | None:
        if lacking := lacks_curvature(manifest):
            return lacking
        for entry in manifest.checkpoints:
            if entry.kind == self.kind and not (_is_sgd(entry) or entry.second_moments):
                return (
                    f"the steps of {entry.optimizer and entry.optimizer.name} are known only from its second moments, "
                    f"and none lie with {entry.name}; record with CheckpointRecorder(optimizer_state=True), and build "
                    "from those checkpoints (`gradtrace build`)"
                )
        return None

    def meaning(self, options: MethodOptions) -> str:
        return (
            "Score: how much what is explained would rise, in its own unit, had the training gone without the row, "
            "times the number of training rows: an estimate from the training's course. Where the index does not know "
            "the optimizer, it is taken for SGD without momentum and weight decay. Of several training runs, the mean"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> GradientScoring:
        entries = contents.manifest.checkpoints
        available = [block for block, entry in enumerate(entries) if entry.kind == self.kind]
        chosen = chosen_checkpoints(entries, options.get("checkpoints"), available, self.kind)
        runs = by_run(entries, chosen)
        factors = torch.zeros(len(entries), contents.bases[0].dimensions)
        for run in by_run(entries, available):
            factors[run] = torch.from_numpy(unrolled(_course(contents, run), self.segments(options))).float()
        trained = trained_models(entries)
        query_at = [trained[entries[block].run] for block in chosen]
        return GradientScoring(contents, chosen, factors[chosen] / len(runs), query_at)

    def segments(self, options: MethodOptions) -> int | None:
        return options.get("segments") or _SEGMENTS


class FastSource(Source):
    """FAST-SOURCE of the same paper: a segment's curvature and gradients are those at the average of its weights."""

    name = "fast-source"
    options = ("checkpoints",)
    kind = "average"

    def lacks(self, manifest: Manifest) -> str | None:
        entries = manifest.checkpoints
        reached = {entry.run: entry.step for entry in entries if entry.kind == "average"}
        for run, last in enumerate(trained_models(entries)):
            if run not in reached:
                return (
                    "it has no averaged weights; build it with average_segments=3 "
                    "(`gradtrace build --average-segments 3`)"
                )
            if reached[run] < entries[last].step:
                return (
                    f"its averaged weights end at step {reached[run]}; build it anew with all checkpoints "
                    "(`gradtrace build`)"
                )
        return super().lacks(manifest)

    def segments(self, options: MethodOptions) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Course:
    """What SOURCE needs to know of a training, at its checkpoints in order.

    lengths: sum of the learning rate over the steps since the checkpoint before. float64 [checkpoints]
    eigenvalues: of the curvature, the weight decay in the loss among it. float64 [checkpoints, dimensions]
    gains: of the optimizer's preconditioner. float64 [checkpoints, dimensions]
    decays: weight decay beside the loss (AdamW's). float64 [checkpoints]
    """

    lengths: Doubles
    eigenvalues: Doubles
    gains: Doubles
    decays: Doubles


def unrolled(course: Course, segments: int | None) -> Doubles:
    """Factors of a query's coordinates for the rows of each checkpoint. float64 [checkpoints, dimensions].

    segments: as even as can be; None: each checkpoint is one
    """
    factors = np.empty_like(course.eigenvalues)
    after = np.ones(factors.shape[1])  # what the later segments leave of a change
    count = min(segments or len(factors), len(factors))
    for part in reversed(np.array_split(np.arange(len(factors)), count)):
        length, gain = course.lengths[part].sum(), course.gains[part].mean(0)
        exponent = length * (gain * course.eigenvalues[part].mean(0) + course.decays[part].mean())
        share = np.divide(-np.expm1(-exponent), exponent, out=np.ones_like(exponent), where=exponent > 0)
        factors[part] = after * gain * length * share / len(part)
        after = after * np.exp(-exponent)
    return factors


def _course(contents: IndexContents, blocks: list[int]) -> Course:
    entries = [contents.manifest.checkpoints[block] for block in blocks]
    found = [contents.curvature[block] for block in blocks]
    eigenvalues = torch.stack([one["eigenvalues"] for one in found]).double().numpy()
    gains = np.ones_like(eigenvalues)
    for number, entry in enumerate(entries):
        if not _is_sgd(entry):
            gains[number] = found[number]["preconditioner"]
    decays = np.array([entry.optimizer.weight_decay if entry.optimizer else 0.0 for entry in entries])
    momenta = np.array([entry.optimizer.momentum if entry.optimizer else 0.0 for entry in entries])
    beside = np.array(["adamw" in entry.optimizer.name if entry.optimizer else False for entry in entries])
    return Course(
        lengths=stretch_sums(entries) / (1 - momenta),
        eigenvalues=eigenvalues + np.where(beside, 0.0, decays)[:, None],
        gains=gains,
        decays=np.where(beside, decays, 0.0),
    )


def _is_sgd(entry: CheckpointEntry) -> bool:
    return entry.optimizer is None or entry.optimizer.name.startswith("sgd")
