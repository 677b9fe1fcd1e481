"""The linear datamodeling score: how well scores predict the outputs of models retrained on subsets of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import EvaluationError

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False, slots=True)
class LinearDatamodelingScore:
    """per_query: float64 [queries].  mean: over the queries.  low, high: bootstrap interval of the mean"""

    per_query: NDArray[np.float64]
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def linear_datamodeling_score(
    scores: Floats,
    subsets: NDArray[np.bool_],
    outputs: Floats,
    *,
    lower_is_better: bool = True,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """The linear datamodeling score, LDS (Park et al. 2023, "TRAK", section 2).

    For each query q, Spearman's rank correlation over the subsets S between sum over rows z in S of score(z, q) and the
    output for q of models that are trained on S only. It is 1 if the scores order the subsets as retraining does, and 0
    if all sums or all outputs are equal.

    The interval is from a bootstrap over both queries and subsets. It does not include the variance over the seeds of
    the trainings.

    Args:
        scores: [queries, rows], positive for proponents, as `Index.scores` returns them.
        subsets: bool [subsets, rows], the rows of each training.
        outputs: [subsets, queries], of the trained models, the mean over seeds.
        lower_is_better: True for outputs that proponents lower, such as `Task.loss` and `Task.measurement`; False for
            those that they raise, such as margins and probabilities of the label.

    Raises:
        EvaluationError: shapes do not match, values are not finite, or there are fewer than 2 subsets.
    """
    _check(scores, subsets, outputs)
    # In float64: between subsets, sums over thousands of rows differ by less than float32 resolves.
    predicted = subsets.astype(np.float64) @ scores.T.astype(np.float64)  # [subsets, queries]
    measured = -outputs if lower_is_better else outputs
    per_query = _spearman(predicted, measured)
    means = list(_resampled_means(predicted, measured, resamples, seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return LinearDatamodelingScore(per_query, float(per_query.mean()), float(low), float(high))


def _spearman(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Spearman's rank correlation of each column of two matrices [n, columns]; 0 where either is constant."""
    from scipy.stats import rankdata  # takes a second, which every command would wait for

    ranks = [rankdata(values, axis=0) - (len(values) + 1) / 2 for values in (a, b)]
    norms = np.linalg.norm(ranks[0], axis=0) * np.linalg.norm(ranks[1], axis=0)
    products = (ranks[0] * ranks[1]).sum(0)
    correlations: NDArray[np.float64] = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return correlations


def _resampled_means(predicted: Floats, measured: Floats, resamples: int, seed: int) -> Iterator[float]:
    """The mean over queries for each bootstrap resample of queries and subsets."""
    generator = np.random.default_rng(seed)
    subsets, queries = predicted.shape
    for _ in range(resamples):
        drawn = np.ix_(generator.integers(subsets, size=subsets), generator.integers(queries, size=queries))
        yield float(_spearman(predicted[drawn], measured[drawn]).mean())


def _check(scores: Floats, subsets: NDArray[np.bool_], outputs: Floats) -> None:
    if subsets.dtype != np.bool_:
        raise EvaluationError(f"subsets are {subsets.dtype}; give a mask, bool [subsets, rows]")
    if (scores.shape[1:], scores.shape[:1]) != (subsets.shape[1:], outputs.shape[1:]) or len(subsets) != len(outputs):
        raise EvaluationError(
            f"scores {list(scores.shape)}, subsets {list(subsets.shape)} and outputs {list(outputs.shape)} do not go "
            "together; give [queries, rows], [subsets, rows] and [subsets, queries] of the same rows and queries"
        )
    if len(subsets) < 2:
        raise EvaluationError("there are fewer than 2 subsets, and a correlation needs more; train on about 100")
    for name, values in (("scores", scores), ("outputs", outputs)):
        if not np.isfinite(values).all():
            raise EvaluationError(
                f"some {name} are not finite: leave deleted rows out (index.present), and use trainings that converge"
            )
