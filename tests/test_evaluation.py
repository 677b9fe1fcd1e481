from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from gradtrace import EvaluationError
from gradtrace.evaluation import linear_datamodeling_score

pytestmark = pytest.mark.unit

QUERIES, ROWS, SUBSETS = 7, 30, 12


def case(seed: int = 0) -> tuple[Any, Any, Any]:
    """Random scores [queries, rows] and halves [subsets, rows], and what an additive model would measure: a loss."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((QUERIES, ROWS)).astype(np.float32)
    subsets = np.stack([generator.permutation(ROWS) < ROWS // 2 for _ in range(SUBSETS)])
    return scores, subsets, 3 - subsets @ scores.T


def test_scores_that_are_exact_reach_one_and_their_negatives_minus_one() -> None:
    scores, subsets, losses = case()
    exact = linear_datamodeling_score(scores, subsets, losses)
    np.testing.assert_allclose(exact.per_query, 1)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((1, 1, 1))
    assert linear_datamodeling_score(-scores, subsets, losses).mean == pytest.approx(-1)
    assert linear_datamodeling_score(scores, subsets, -losses, lower_is_better=False).mean == pytest.approx(1)


@given(arrays(np.int8, (QUERIES, ROWS), elements=st.integers(-2, 2)), arrays(np.int8, (SUBSETS, QUERIES)))
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_each_query_has_the_rank_correlation_of_scipy_ties_or_not(scores: Any, outputs: Any) -> None:
    subsets = case()[1]
    found = linear_datamodeling_score(scores.astype(float), subsets, outputs.astype(float), resamples=2)
    expected = [spearmanr(subsets @ a, -b.astype(int)).statistic for a, b in zip(scores, outputs.T, strict=True)]
    np.testing.assert_allclose(found.per_query, np.nan_to_num(expected), atol=1e-12)  # NaN: one of them is constant
    assert found.mean == pytest.approx(found.per_query.mean())


def test_the_interval_is_repeatable_holds_the_mean_and_shrinks_with_more_subsets() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for count in (40, 400):
        scores = generator.standard_normal((10, ROWS))
        subsets = generator.random((count, ROWS)) < 0.5
        losses = generator.standard_normal((count, 10)) * 5 - subsets @ scores.T
        found = linear_datamodeling_score(scores, subsets, losses)
        assert (found.low, found.high) == (lambda r: (r.low, r.high))(
            linear_datamodeling_score(scores, subsets, losses)
        )
        assert found.low < found.mean < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.7 * widths[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a, s, o: (a[:, 1:], s, o), "do not go together; give"),
        (lambda a, s, o: (a, s[1:], o), "do not go together"),
        (lambda a, s, o: (a, s, o[:, 1:]), "do not go together"),
        (lambda a, s, o: (a, s.astype(int), o), "give a mask"),
        (lambda a, s, o: (a, s[:1], o[:1]), "fewer than 2 subsets"),
        (
            lambda a, s, o: (np.where(np.arange(ROWS) == 3, np.nan, a), s, o),
            "scores are not finite: leave",
        ),
        (lambda a, s, o: (a, s, o * np.inf), "outputs are not finite"),
    ],
)
def test_what_does_not_go_together_is_refused(change: Any, text: str) -> None:
    with pytest.raises(EvaluationError, match=text):
        linear_datamodeling_score(*change(*case()))
