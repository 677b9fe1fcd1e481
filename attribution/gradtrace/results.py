"""What a query returns: hits at both ends, and how the scores came about."""

from __future__ import annotations

from dataclasses import dataclass

from gradtrace.distribution import Distribution
from gradtrace.task import Label


@dataclass(frozen=True, slots=True)
class Hit:
    """One training row. Positive score: a proponent, which pushed the explained quantity down (made it better)."""

    row: int
    score: float
    parts: dict[str, float]  # checkpoint name -> its share of the score; the shares sum to the score
    label: Label | None
    prediction: Label | None  # of the last checkpoint
    loss: float  # at the last checkpoint
    correct: bool | None
    layers: dict[str, float] | None = None  # layer name -> its share of the score, likewise; where asked for
    percentile: float | None = None  # share of all rows of the index with a lower score, in %; where asked for


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares of the exact best and worst rows that an approximate searcher found on held-out queries at its build."""

    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class InfluenceResult:
    """The answer to one query, or to the mean of several, most extreme hit first at either end.

    Proponents have positive scores and opponents negative ones, so there may be fewer than were asked for, and `note`
    says so. Of `repsim` alone they are the most and the least alike, whatever their signs. Of several queries, `label`
    and `prediction` are those that all share, and `loss` is their mean.
    """

    proponents: list[Hit]
    opponents: list[Hit]
    method: str
    target: str  # what is explained: "loss", "loss at the predicted label", "measurement" or "prediction"
    label: Label | None
    prediction: Label | None
    loss: float  # of the query at the last checkpoint
    exact: bool  # True: the rows found are those that scoring every stored row would find
    recall: Recall | None  # of the searcher with this method, where not exact and measured
    rows_touched: int  # rows of which more than the first level was read
    rows_searched: int  # rows that the filter left
    queries: int = 1
    rows_rescored: int = 0  # candidates that were scored by full gradients; 0: scores are those of the stored rows
    distribution: Distribution | None = None  # where percentiles were asked for
    note: str | None = None  # why there are fewer hits than asked for, or why every score is zero

    @property
    def rescored(self) -> bool:
        return self.rows_rescored > 0
