"""Scores by position: what each token of a training text, and each of a query's, adds to a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradtrace.models.queries import Query
from gradtrace.search.scored_rows import Doubles, Floats, Rows
from gradtrace.task import Example

Lengths = Sequence[int]  # of the sequences that a model's layers run over with an example, usually one


@dataclass(frozen=True)
class PositionQuestion:
    """A query and the training rows whose scores are split.

    query_lengths: of each of the examples that are explained of the query
    rows: where the rows are in the store, [n];  examples, lengths: of each row
    """

    query: Query
    query_lengths: Sequence[Lengths]
    rows: Rows
    examples: Sequence[Example]
    lengths: Sequence[Lengths]


@dataclass(frozen=True)
class PositionScores:
    """Either side sums to the scores, but for what has no position and, of training rows, the rounding.

    scores: float64 [n]
    training: of each row float64 [positions]
    query: of each of the examples that are explained float64 [positions, n]
    """

    scores: Doubles
    training: Sequence[Doubles]
    query: Sequence[Doubles]

    @classmethod
    def summed(cls, split: Sequence[PositionScores], scales: Doubles | Floats) -> PositionScores:
        """The sum over several blocks, times the rows' scales [n]."""
        scores = np.sum([of_block.scores for of_block in split], axis=0) * scales
        by_row = zip(*(of_block.training for of_block in split), strict=True)
        by_example = zip(*(of_block.query for of_block in split), strict=True)
        return cls(
            scores,
            [np.sum(blocks, axis=0) * scale for blocks, scale in zip(by_row, scales, strict=True)],
            [np.sum(blocks, axis=0) * scales for blocks in by_example],
        )
