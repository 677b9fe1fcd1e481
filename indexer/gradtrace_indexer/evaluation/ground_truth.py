"""The values of training rows by retraining: random subsets, leaving one out, downsampling, Shapley values.

Signs are those of `Index.scores`: a row's value is positive where training on it lowers the query's measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import EvaluationError
from gradtrace_indexer.evaluation.retraining import Outputs, Retrainings, Trainer, Training


@dataclass(frozen=True, eq=False, slots=True)
class SubsetOutputs:
    """Models trained on random subsets of the rows.

    Attributes:
        subsets: bool [subsets, rows].
        outputs: float32 [subsets, seeds, queries], measured on each model.
    """

    subsets: NDArray[np.bool_]
    outputs: Outputs

    @property
    def means(self) -> Outputs:
        """Over the seeds. float32 [subsets, queries]."""
        means: Outputs = self.outputs.mean(1)
        return means


def subset_outputs(
    retrainings: Retrainings,
    count: int = 100,
    seeds: int = 5,
    *,
    fraction: float = 0.5,
    seed: int = 0,
    among: NDArray[np.int64] | None = None,
) -> SubsetOutputs:
    """Train on random subsets of the rows, several times each: the ground truth of the linear datamodeling score.

    The first subsets and trainings are the same for larger `count` and `seeds`, so that only the others are trained.

    among: int64 [n], the rows that subsets are drawn from, `np.flatnonzero(index.present)` where rows are deleted;
        None: all.

    Raises as `Retrainings.map`.
    """
    subsets = random_subsets(retrainings.rows, count, fraction, seed, among)
    trainings = [
        Training(np.flatnonzero(subset).tolist(), _seed(seed, number, repeat))
        for number, subset in enumerate(subsets)
        for repeat in range(seeds)
    ]
    return SubsetOutputs(subsets, retrainings.outputs(trainings).reshape(count, seeds, -1))


def random_subsets(
    rows: int, count: int, fraction: float, seed: int, among: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """Masks of a share of the rows `among`, or of all, without replacement; each depends on its own number only.

    bool [count, rows]."""
    drawn = np.arange(rows) if among is None else among
    subsets = np.zeros((count, rows), dtype=bool)
    for number, subset in enumerate(subsets):
        generator = np.random.default_rng([seed, number])
        subset[drawn[generator.choice(len(drawn), round(fraction * len(drawn)), replace=False)]] = True
    return subsets


def leave_one_out(
    retrainings: Retrainings, rows: Sequence[int] | None = None, *, seeds: int = 1, seed: int = 0
) -> NDArray[np.float32]:
    """The measurement after training without a row, minus that after training on all rows; means over seeds.

    Args:
        rows: the rows that are left out, one at a time; default: all.

    Returns:
        float32 [queries, rows]; NaN for the other rows. Raises as `Retrainings.map`.
    """
    all_rows = range(retrainings.rows)
    left_out = list(all_rows if rows is None else rows)
    subsets = [list(all_rows), *([other for other in all_rows if other != row] for row in left_out)]
    repeats = [_seed(seed, 0, repeat) for repeat in range(seeds)]  # the same for all subsets: only the row differs
    outputs = retrainings.outputs([Training(subset, repeat) for subset in subsets for repeat in repeats])
    means = outputs.reshape(len(subsets), seeds, -1).mean(1)
    values = np.full((outputs.shape[1], retrainings.rows), np.nan, dtype=np.float32)
    values[:, left_out] = (means[1:] - means[0]).T
    return values


def downsampling(truth: SubsetOutputs) -> NDArray[np.float32]:
    """Subsampled influence (Feldman and Zhang 2020, section 3.2): the mean measurement of the models that were trained
    without a row, minus that of those that were trained with it.

    The paper measures accuracy with random 70 % of the rows; here the measurement is that of the trainings, with any
    fraction. A row's value on itself, from `split="train"`, estimates its memorization.

    Returns:
        float32 [queries, rows]; NaN for rows that are in all of the subsets, or in none.
    """
    inside = truth.subsets.astype(np.float64)  # [subsets, rows]
    means = truth.means.T.astype(np.float64)  # [queries, subsets]
    with np.errstate(invalid="ignore"):
        values = means @ (1 - inside) / (1 - inside).sum(0) - means @ inside / inside.sum(0)
    single: NDArray[np.float32] = values.astype(np.float32)
    return single


@dataclass(frozen=True, eq=False, slots=True)
class ShapleyValues:
    """Attributes:
    values: float32 [queries, rows], means over the permutations.
    errors: float32 [queries, rows], their standard errors.
    """

    values: NDArray[np.float32]
    errors: NDArray[np.float32]


def shapley(
    retrainings: Retrainings, permutations: int = 100, *, tolerance: float = 0.01, seed: int = 0
) -> ShapleyValues:
    """Data Shapley values by truncated Monte Carlo (Ghorbani and Zou 2019, Algorithm 1).

    For each random permutation, models are trained on its first 0, 1, 2 ... rows with one seed; a row's marginal value
    is how much it lowers the measurement. The rest of a permutation counts as zero once the mean over the queries
    differs from that of all rows by less than `tolerance`, a share of the change that training on all rows makes.
    Without truncation (tolerance 0), the values of a query sum to that change.

    Raises:
        EvaluationError: fewer than 2 permutations, of which there is no standard error.
        and as `Retrainings.map`.
    """
    if permutations < 2:
        raise EvaluationError(f"permutations={permutations}: give at least 2; Shapley values need many")
    walks = [
        Walk(np.random.default_rng([seed, number]).permutation(retrainings.rows), _seed(seed, number, 0), tolerance)
        for number in range(permutations)
    ]
    marginals = np.stack(retrainings.map(marginal_values, walks, "walk"))  # [permutations, queries, rows]
    return ShapleyValues(marginals.mean(0), marginals.std(0, ddof=1) / np.float32(np.sqrt(permutations)))


@dataclass(frozen=True, eq=False, slots=True)
class Walk:
    """One permutation of the rows, `order` int64 [rows]."""

    order: NDArray[np.int64]
    seed: int
    tolerance: float


def marginal_values(trainer: Trainer, walk: Walk) -> NDArray[np.float32]:
    """How much each row lowers the measurement when it is added in the permutation's order. float32 [queries, rows]."""
    order = walk.order.tolist()
    before, whole = trainer.output(Training([], walk.seed)), trainer.output(Training(order, walk.seed))
    near = walk.tolerance * abs(float((before - whole).mean()))
    marginals = np.zeros((len(before), len(order)), dtype=np.float32)
    for place, row in enumerate(order):
        if abs(float((before - whole).mean())) < near:
            break
        after = trainer.output(Training(order[: place + 1], walk.seed))
        marginals[:, row] = before - after
        before = after
    return marginals


def _seed(seed: int, subset: int, repeat: int) -> int:
    """A seed unrelated to those of other subsets and repeats, and to the small numbers that users choose."""
    return int(np.random.SeedSequence([seed, subset, repeat]).generate_state(1)[0])
