"""Two questions compared over all rows, beside SciPy's correlations and sets of the rows at both ends."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradtrace import QueryError
from gradtrace.results.comparison import MOST_POINTS, Scores, compare_scores

pytestmark = pytest.mark.unit


def made(rows: int = 500, seed: int = 0) -> tuple[Scores, Scores]:
    """Alike but for noise, with ties; row 3 is missing on one side, row 4 on the other."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=rows).round(1).astype(np.float32)
    other = (scores + generator.normal(size=rows)).astype(np.float32)
    sides = [Scores(values, np.ones(rows, dtype=bool)) for values in (scores, other)]
    for row, side in zip((3, 4), sides, strict=True):
        side.present[row], side.scores[row] = False, 100
    return sides[0], sides[1]


def test_correlations_are_those_of_scipy() -> None:
    first, second = made()
    both = first.present & second.present
    found = compare_scores(first, second)
    assert found.rows == 498
    assert found.pearson == pytest.approx(stats.pearsonr(first.scores[both], second.scores[both]).statistic, rel=1e-5)
    assert found.spearman == pytest.approx(stats.spearmanr(first.scores[both], second.scores[both]).statistic)


@pytest.mark.parametrize("k", [1, 10, 400])
def test_overlaps_are_of_sets(k: int) -> None:
    sides = made()
    ends = []
    for side in sides:
        rows = [row for row in range(500) if sides[0].present[row] and sides[1].present[row]]
        best = sorted((row for row in rows if side.scores[row] > 0), key=lambda row: (-side.scores[row], row))[:k]
        worst = sorted((row for row in rows if side.scores[row] < 0), key=lambda row: (side.scores[row], row))[:k]
        ends.append((set(best), set(worst)))
    found = compare_scores(*sides, k=k)
    assert found.proponents == len(ends[0][0] & ends[1][0])
    assert found.opponents == len(ends[0][1] & ends[1][1])
    assert set().union(*ends[0], *ends[1]) <= set(found.points.tolist())
    assert found.first.tolist() == sides[0].scores[found.points].tolist()
    assert found.second.tolist() == sides[1].scores[found.points].tolist()


def test_points_are_the_hits_and_an_even_sample() -> None:
    first, second = made(50_000)
    points = compare_scores(first, second, k=500).points
    assert len(points) == MOST_POINTS == len(set(points.tolist()))
    assert not {3, 4} & set(points.tolist())
    few = compare_scores(first, second, k=1).points
    assert len(few) == MOST_POINTS
    assert np.diff(few).max() < 2.1 * 50_000 / MOST_POINTS


def test_similarities_have_ends_whatever_their_signs() -> None:
    scores = np.arange(1, 21, dtype=np.float32)
    side = Scores(scores, np.ones(20, dtype=bool), signed=False)
    found = compare_scores(side, Scores(-scores, side.present), k=3)
    assert (found.proponents, found.opponents) == (0, 0)
    assert found.pearson == pytest.approx(-1)
    assert compare_scores(side, side, k=3).opponents == 3


def test_what_has_no_correlation_and_what_is_refused() -> None:
    first, second = made()
    constant = Scores(np.ones_like(first.scores), first.present)
    assert compare_scores(first, constant).pearson is None
    assert compare_scores(first, constant).spearman is None
    with pytest.raises(QueryError, match=r"500 and 40 training rows: only scores of the same training data"):
        compare_scores(first, Scores(first.scores[:40], first.present[:40]))
    with pytest.raises(QueryError, match="no training row is in both"):
        compare_scores(first, Scores(second.scores, ~first.present))
    for k in (0, 501):
        with pytest.raises(QueryError, match="k must be from 1 to 500"):
            compare_scores(first, second, k=k)
