"""What leaving rows out of the training would do to queries, by the sums of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.methods import Scoring
from gradtrace.methods.vectors import Vectors, times_blocks, vector_batches
from gradtrace.models.queries import Query

_SCORES_TOGETHER = 1 << 25  # scores of all rows on some queries that are held at a time


@dataclass(frozen=True, slots=True)
class RemovalEffect:
    """What some training rows do together to a query.

    target: the quantity of the query that is explained
    loss: the query's, at the last checkpoint
    score_sum: of the rows; above zero they are proponents together
    predicted_change: how much what is explained would rise, in its own unit, if the rows were left out of the training;
        None: the method predicts nothing in that unit, and sums only order sets of rows
    """

    target: str
    loss: float
    score_sum: float
    predicted_change: float | None


def removal_effects(scoring: Scoring[Any], queries: Sequence[Query], removed: NDArray[np.bool_]) -> list[RemovalEffect]:
    """One for each query, in their order.  removed: bool [stored rows]"""
    vectors, losses = scoring.query_vectors(queries)
    sums, factors = _sums(scoring, vectors, removed), scoring.removal_factors
    changes: list[float] | list[None] = [None] * len(queries)
    if factors is not None and len(set(factors.tolist())) == 1:
        changes = (sums * factors[0]).tolist()
    elif factors is not None:
        changes = _sums(scoring, times_blocks(vectors, factors), removed).tolist()
    terms = zip(queries, losses, sums.tolist(), changes, strict=True)
    return [RemovalEffect(query.target, loss, total, change) for query, loss, total, change in terms]


def _sums(scoring: Scoring[Any], vectors: Vectors, removed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of the removed rows' scores, in float64. [queries]"""
    together = max(1, _SCORES_TOGETHER // scoring.store.rows)
    by_batch = (
        scoring.scores(batch)[:, removed].sum(1, dtype=np.float64) for batch in vector_batches(vectors, together)
    )
    return np.concatenate(list(by_batch))
