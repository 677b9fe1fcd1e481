"""What a query returns: hits at both ends, and how the scores came about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.results.display import frame, label_text, table_html, table_text, training_example_html
from gradtrace.results.probable_classes import ClassProbability
from gradtrace.task import Label, Task

if TYPE_CHECKING:
    import pandas

_BINS = 60
_QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_HEADS = ("row", "score", "label", "prediction", "loss")
_HEADS_WITHOUT_LABELS = ("row", "score", "loss")  # of texts, which have none


@dataclass(frozen=True, slots=True, repr=False)
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
    cluster: int | None = None  # the highest hit of the end that it is a near-duplicate of, or itself; where asked for

    def __repr__(self) -> str:
        labels = f"label={self.label}, prediction={self.prediction}"
        return f"Hit(row={self.row}, score={self.score:+.4g}, {labels}, loss={self.loss:.4g})"

    def record(self) -> dict[str, Any]:
        """Its values by name, each checkpoint's part as `part:NAME` and each layer's share as `layer:NAME`."""
        names = ("row", "score", "label", "prediction", "loss", "correct", "percentile", "cluster")
        parts = {f"part:{name}": part for name, part in self.parts.items()}
        layers = {f"layer:{name}": share for name, share in (self.layers or {}).items()}
        return {name: getattr(self, name) for name in names} | parts | layers


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares of the exact best and worst rows that an approximate searcher found on held-out queries at its build."""

    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many rows have a score from edges[i] on and below edges[i + 1], which belongs to the last bin.

    edges: [bins + 1], of equal distances from the lowest score to the highest;  counts: [bins]
    """

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, scores: NDArray[np.float32]) -> Histogram:
        """scores: [rows]; where all are equal, the bins lie around their value."""
        counts, edges = np.histogram(scores.astype(np.float64), _BINS)
        return cls(edges.tolist(), counts.tolist())


@dataclass(frozen=True, slots=True)
class Distribution:
    """The scores of all rows of the index on one query, whatever its filter.

    quantiles: by percentage ("0" is the lowest score, "50" the median, "100" the highest)
    """

    mean: float
    std: float
    quantiles: dict[str, float]
    histogram: Histogram | None = None  # where asked for

    @classmethod
    def of(cls, scores: NDArray[np.float32], histogram: bool = False) -> Distribution:
        """scores: [rows]."""
        values = np.percentile(scores, _QUANTILES)
        quantiles = {str(share): float(value) for share, value in zip(_QUANTILES, values, strict=True)}
        mean, std = float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64))
        return cls(mean, std, quantiles, Histogram.of(scores) if histogram else None)


@dataclass(frozen=True, slots=True, repr=False)
class InfluenceResult:
    """The answer to one query, or to the mean of several, most extreme hit first at either end.

    Proponents have positive scores and opponents negative ones, so there may be fewer than were asked for, and `note`
    says so. Of `repsim` and `bm25` they are the most and the least alike, whatever their signs. Of several queries,
    `label` and `prediction` are those that all share, and `loss` is their mean.
    """

    proponents: list[Hit]
    opponents: list[Hit]
    method: str
    target: str  # in words, such as "loss", "loss at the predicted label", "measurement" or "prediction"
    label: Label | None
    prediction: Label | None
    loss: float  # of the query at the last checkpoint, at its own label or the predicted one, whatever the target
    exact: bool  # True: the rows found are those that scoring every stored row would find
    recall: Recall | None  # of the searcher with this method, where not exact and measured
    rows_touched: int  # rows of which more than the first level was read
    rows_searched: int  # rows that the filter left
    queries: int = 1
    rows_rescored: int = 0  # candidates that were scored by full gradients; 0: scores are those of the stored rows
    distribution: Distribution | None = None  # where percentiles or the histogram were asked for
    probabilities: list[ClassProbability] | None = None  # the largest first, where asked for and known
    note: str | None = None  # why there are fewer hits than asked for, or why every score is zero

    task: Task | None = field(default=None, compare=False)  # names classes and renders rows where it is shown

    @property
    def rescored(self) -> bool:
        return self.rows_rescored > 0

    def to_pandas(self) -> pandas.DataFrame:
        """A line for each hit: its side, its rank from 1 on, its values, and each checkpoint's part as `part:NAME`.

        Raises:
            MissingLibraryError: pandas is not installed.
        """
        return frame(self._records())

    def __repr__(self) -> str:
        tables = (
            f"{name}:\n{table_text(self._heads(), map(self._cells, hits))}" if hits else f"{name}: none"
            for name, hits in (("proponents", self.proponents), ("opponents", self.opponents))
        )
        return "\n".join([self._title(), *tables])

    def _repr_html_(self) -> str:
        heads = self._heads() if self.task is None else (*self._heads(), "example")
        tables = (
            table_html(title, heads, map(self._html_cells, hits))
            for title, hits in (("Proponents", self.proponents), ("Opponents", self.opponents))
        )
        return f"<div><p>{escape(self._title())}</p>{''.join(tables)}</div>"

    def _title(self) -> str:
        queries = f"mean of {self.queries} queries" if self.queries > 1 else "query"
        label, prediction = label_text(self.label, self.task), label_text(self.prediction, self.task)
        labels = f"label {label}, predicted {prediction}, " if self._has_labels() else ""
        search = "exact" if self.exact else "approximate"
        return (
            f"{self.method} of {queries}: {labels}loss {self.loss:.4g}; explained: {self.target}; "
            f"{search} search of {self.rows_searched:,} rows"
        )

    def _has_labels(self) -> bool:
        of_hits = [label for hit in (*self.proponents, *self.opponents) for label in (hit.label, hit.prediction)]
        return any(label is not None for label in (self.label, self.prediction, *of_hits))

    def _heads(self) -> tuple[str, ...]:
        return _HEADS if self._has_labels() else _HEADS_WITHOUT_LABELS

    def _cells(self, hit: Hit) -> list[str]:
        """The texts under `_heads`."""
        labels = [label_text(label, self.task) for label in (hit.label, hit.prediction)] if self._has_labels() else []
        return [str(hit.row), f"{hit.score:+.4g}", *labels, f"{hit.loss:.4g}"]

    def _html_cells(self, hit: Hit) -> list[str]:
        cells = [*map(escape, self._cells(hit))]
        if self.task is None:
            return cells
        example = training_example_html(self.task, hit.row)
        return [*cells, f'<div style="text-align:left">{example}</div>']  # notebooks align cells on the right

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"side": side, "rank": rank, **hit.record()}
            for side, hits in (("proponent", self.proponents), ("opponent", self.opponents))
            for rank, hit in enumerate(hits, 1)
        ]


class InfluenceResults(list[InfluenceResult]):
    """The answers to several queries, in their order.

    timing: milliseconds by stage: "gradient", "search", "rescore", "percentiles" and "rest".
    """

    def __init__(self, results: Iterable[InfluenceResult], timing: dict[str, float]) -> None:
        super().__init__(results)
        self.timing = timing

    def to_pandas(self) -> pandas.DataFrame:
        """As that of each result, with the position of its query as `query`. Raises MissingLibraryError."""
        return frame([{"query": query, **record} for query, result in enumerate(self) for record in result._records()])

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self)) or "[]"

    def _repr_html_(self) -> str:
        return "".join(result._repr_html_() for result in self)
