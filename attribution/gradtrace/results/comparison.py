"""Two sets of scores of the same training rows, side by side: how alike they are, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import QueryError
from gradtrace.search.scored_rows import Floats, Rows

MOST_POINTS = 2_000
MOST_COMPARED_HITS = MOST_POINTS // 4  # those of both ends of both sides are among the points


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of all training rows on one query, or on the mean of several.

    scores: float32 [rows].  present: bool [rows], as `Index.present`
    signed: whether only positive scores are proponents and only negative ones opponents, as of all methods but `repsim`
        and `bm25`
    target: what is explained, in words
    """

    scores: Floats
    present: NDArray[np.bool_]
    signed: bool = True
    target: str = "loss"


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    pearson, spearman: correlations of the two scores over all rows; None where either is the same for all of them
    proponents, opponents: how many of the k strongest of either side are among those of the other side
    rows: number of rows that both sides have
    points: int64 [<= 2,000], ascending: the hits of both ends of both sides, and an even sample of the other rows
    first, second: float32, their scores
    """

    pearson: float | None
    spearman: float | None
    proponents: int
    opponents: int
    rows: int
    points: Rows
    first: Floats
    second: Floats


def compare_scores(first: Scores, second: Scores, k: int = 10) -> Comparison:
    """Compare two questions about the same training rows. Rows that either side has not, as deleted ones, are left out.

    k: hits at either end, at most 500

    Raises:
        QueryError: the sides have different numbers of rows, or none in common, or k is out of range.
    """
    from scipy.stats import rankdata  # takes long to import

    if len(first.scores) != len(second.scores):
        raise QueryError(
            f"the scores are of {len(first.scores):,} and {len(second.scores):,} training rows: only scores of the "
            "same training data can be compared row by row"
        )
    if not 1 <= k <= MOST_COMPARED_HITS:
        raise QueryError(f"k must be from 1 to {MOST_COMPARED_HITS}, not {k}")
    rows = np.flatnonzero(first.present & second.present)
    if not len(rows):
        raise QueryError("no training row is in both: there is nothing to compare")
    (top, bottom), (other_top, other_bottom) = (_ends(side, rows, k) for side in (first, second))
    points = _points(rows, np.unique(np.concatenate([top, bottom, other_top, other_bottom])))
    a, b = first.scores[rows], second.scores[rows]
    return Comparison(
        pearson=_correlation(a, b),
        spearman=_correlation(rankdata(a), rankdata(b)),
        proponents=len(np.intersect1d(top, other_top)),
        opponents=len(np.intersect1d(bottom, other_bottom)),
        rows=len(rows),
        points=points,
        first=first.scores[points],
        second=second.scores[points],
    )


def _ends(side: Scores, rows: Rows, k: int) -> tuple[Rows, Rows]:
    """The k strongest of these rows [m], ascending, at either end; of equal scores the lower row."""
    scores = side.scores[rows]
    ends = (np.argsort(sign * scores, kind="stable")[:k] for sign in (-1, 1))
    top, bottom = (
        rows[end[sign * scores[end] > 0] if side.signed else end] for sign, end in zip((1, -1), ends, strict=True)
    )
    return top, bottom


def _points(rows: Rows, hits: Rows) -> Rows:
    """The hits, and of the other rows as many as there is room for, evenly spaced."""
    others = np.setdiff1d(rows, hits, assume_unique=True)
    room = min(MOST_POINTS - len(hits), len(others))
    spaced = others[np.linspace(0, len(others) - 1, room).astype(np.int64)] if room else others[:0]
    return np.union1d(hits, spaced)


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    a, b = (values - values.mean() for values in (a.astype(np.float64), b.astype(np.float64)))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else None
