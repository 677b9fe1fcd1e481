"""SOURCE: approximate unrolled differentiation of the training, in segments of one curvature and one gradient each."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.contents import IndexContents
from gradtrace.fitted.curvature import Columns
from gradtrace.methods.method import Method, MethodOptions, Scoring, chosen_checkpoints
from gradtrace.methods.sparse_scoring import scoring_of_rows
from gradtrace.search.scored_rows import Doubles
from gradtrace.store.manifest import CheckpointEntry, CheckpointKind, Manifest, Optimizer, by_run, trained_models

_SEGMENTS = 3
_PLAIN_SGD = Optimizer(name="sgd", momentum=0.0, weight_decay=0.0)  # where the optimizer is not known


class Source(Method):
    """SOURCE, Bae et al. 2024, Equations 16 and 20 to 22.

    With the checkpoints in L segments, each with its stationary curvature H_l, gradient g_l of a row, and K_l steps of
    mean learning rate eta_l, the score of the row for a query's gradient q is

        sum_l q . exp(-eta_L K_L H_L) ... exp(-eta_(l+1) K_(l+1) H_(l+1)) (1 - exp(-eta_l K_l H_l)) H_l^-1 g_l

    H_l is approximated as diagonal in the run's basis, which all segments share, where the paper fits one for each; of
    sparse rows, in the weights themselves. In Gauss-Newton coordinates and of sparse rows the query's gradient is that
    of each checkpoint too, as the row's is, where the paper takes the one at the end of training: measured, that
    predicts retraining better (docs/methods.md). Heavy-ball momentum divides the learning rate by 1 - momentum
    (Appendix C); weight decay adds to the curvature. Adam and its kin precondition the steps by P = 1 / (sqrt(v) + eps)
    (Appendix C), of which the diagonal in these coordinates is taken; the paper takes, for Adam, a diagonal Hessian of
    the weights in the exponentials and EK-FAC for the inverse.
    """

    name = "source"
    options: ClassVar[tuple[str, ...]] = ("checkpoints", "segments")
    forecasts = True
    uses_curvature = True
    kind: ClassVar[CheckpointKind] = "weights"
    meaning = (
        "Score: how much what is explained would rise, in its own unit, had the training gone without the row, times "
        "the number of training rows: an estimate from the training's course. Where the index does not know the "
        "optimizer, it is taken for SGD without momentum and weight decay. Of several training runs, the mean"
    )
    removal = "the sum of their scores, divided by the number of training rows"

    def lacks(self, manifest: Manifest) -> str | None:
        if lacking := super().lacks(manifest):
            return lacking
        for entry in manifest.checkpoints:
            if entry.kind == self.kind and not (_is_sgd(entry) or entry.second_moments):
                return (
                    f"the steps of {entry.optimizer and entry.optimizer.name} are known only from its second moments, "
                    f"and none lie with {entry.name}; record with CheckpointRecorder(optimizer_state=True), and build "
                    "from those checkpoints (`gradtrace build`)"
                )
        return None

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        entries = contents.manifest.checkpoints
        available = [block for block, entry in enumerate(entries) if entry.kind == self.kind]
        chosen = chosen_checkpoints(entries, options, available, self.kind)
        segments = None if self.kind == "average" else options.get("segments") or _SEGMENTS
        run_of = {block: run for run in by_run(entries, available) for block in run}
        runs = len(by_run(entries, chosen))

        def factors(place: int, columns: Columns) -> Tensor:
            run = run_of[block := chosen[place]]
            return torch.from_numpy(_run_factors(contents, run, segments, columns)[run.index(block)]) / runs

        query_at, trained = None, trained_models(entries)
        if not contents.sums_checkpoints:
            query_at = [trained[entries[block].run] for block in chosen]
        scoring = scoring_of_rows(contents, chosen, factors, query_at)
        scoring.removal_factors = np.full(len(chosen), 1 / contents.manifest.task.train_rows)
        return scoring


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


def unrolled(lengths: Doubles, eigenvalues: Doubles, gains: Doubles, decays: Doubles, segments: int | None) -> Doubles:
    """Factors of a query's coordinates for the rows of each checkpoint. float64 [checkpoints, dimensions].

    For segment l, with x_l = eta_l K_l (P_l H_l + decay_l), the factor is
    exp(-x_L) ... exp(-x_(l+1)) eta_l K_l P_l (1 - exp(-x_l)) / x_l, divided evenly among the segment's checkpoints.

    Args:
        lengths: eta K, the sum of the learning rates of the steps since the previous checkpoint. float64 [checkpoints]
        eigenvalues: H, with the weight decay that is part of the loss. float64 [checkpoints, dimensions]
        gains: P, the diagonal of the optimizer's preconditioner. float64 [checkpoints, dimensions]
        decays: weight decay that is not part of the loss (AdamW's). float64 [checkpoints]
        segments: their number, of as equal sizes as possible; None: each checkpoint is a segment.
    """
    factors = np.empty_like(eigenvalues)
    decay_after = np.ones(factors.shape[1])  # exp(-x) of the later segments, multiplied
    count = min(segments or len(factors), len(factors))
    for segment in reversed(np.array_split(np.arange(len(factors)), count)):
        length, gain = lengths[segment].sum(), gains[segment].mean(0)
        exponent = length * (gain * eigenvalues[segment].mean(0) + decays[segment].mean())
        share = np.divide(-np.expm1(-exponent), exponent, out=np.ones_like(exponent), where=exponent > 0)
        factors[segment] = decay_after * gain * length * share / len(segment)
        decay_after = decay_after * np.exp(-exponent)
    return factors


def _run_factors(contents: IndexContents, blocks: list[int], segments: int | None, columns: Columns) -> Doubles:
    """As `unrolled`, of the checkpoints of a training run, in some of the columns."""
    entries = [contents.manifest.checkpoints[block] for block in blocks]
    curvature = [contents.curvature[block].at(columns) for block in blocks]
    eigenvalues = torch.stack([checkpoint.eigenvalues for checkpoint in curvature]).double().numpy()
    gains = np.ones_like(eigenvalues)
    for number, entry in enumerate(entries):
        if not _is_sgd(entry):
            preconditioner = curvature[number].preconditioner
            assert preconditioner is not None  # else `lacks` refused
            gains[number] = preconditioner
    optimizers = [entry.optimizer or _PLAIN_SGD for entry in entries]
    decays = np.array([optimizer.weight_decay for optimizer in optimizers])
    momenta = np.array([optimizer.momentum for optimizer in optimizers])
    decoupled = np.array(["adamw" in optimizer.name for optimizer in optimizers])
    return unrolled(
        lengths=stretch_sums(entries) / (1 - momenta),
        eigenvalues=eigenvalues + np.where(decoupled, 0.0, decays)[:, None],
        gains=gains,
        decays=np.where(decoupled, decays, 0.0),
        segments=segments,
    )


def _is_sgd(entry: CheckpointEntry) -> bool:
    return (entry.optimizer or _PLAIN_SGD).name.startswith("sgd")
