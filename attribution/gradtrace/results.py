"""What a query returns: hits at both ends, and how the scores came about."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares of the exact best and worst rows that an approximate searcher found on held-out queries at its build."""

    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class InfluenceResult:
    """The answer to one query, most extreme hit first at either end."""

    proponents: list[Hit]
    opponents: list[Hit]
    method: str
    target: str  # what is explained: "loss", "loss at the predicted label", "measurement" or "prediction"
    label: Label | None
    prediction: Label | None
    loss: float  # of the query at the last checkpoint
    exact: bool  # True: the same as scoring every row
    recall: Recall | None  # of the searcher with this method, where not exact and measured
    rows_touched: int  # rows of which more than the first level was read
    rows_searched: int  # rows that the filter left
