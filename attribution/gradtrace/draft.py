"""A result in the making: what is known of one query's hits so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.distribution import Distribution, describe, percentiles
from gradtrace.queries import Query
from gradtrace.results import Hit, InfluenceResult
from gradtrace.search import SearchResult
from gradtrace.task import Label


@dataclass(slots=True)
class Draft:
    """The result for the mean of some queries, mostly of one. What was not asked for stays empty."""

    queries: Sequence[Query]
    losses: Sequence[float]
    found: SearchResult
    rows_rescored: int = 0
    layers: dict[int, dict[str, float]] = field(default_factory=dict)  # row -> layer name -> share of the score
    percentiles: dict[int, float] = field(default_factory=dict)  # row -> percentile
    distribution: Distribution | None = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Those of both ends, ascending."""
        return np.union1d(self.found.top_rows, self.found.bottom_rows)

    def share_by_layer(self, rows: NDArray[np.int64], layers: Mapping[str, NDArray[np.float64]]) -> None:
        """layers: by name the shares [m] in the scores of `rows` [m]."""
        shares = zip(*(layer.tolist() for layer in layers.values()), strict=True)
        self.layers = {row: dict(zip(layers, own, strict=True)) for row, own in zip(rows.tolist(), shares, strict=True)}

    def place_among(self, scores: NDArray[np.float32]) -> None:
        """scores: [rows] of all rows of the index; overwritten where exact ones are known."""
        rows, found = self.rows, self.found
        if self.rows_rescored:
            scores[found.top_rows], scores[found.bottom_rows] = found.top_scores, found.bottom_scores
        self.distribution = describe(scores)
        self.percentiles = dict(zip(rows.tolist(), percentiles(scores, scores[rows]).tolist(), strict=True))

    def result(self, method: str, checkpoints: Sequence[str], columns: Mapping[str, NDArray[Any]]) -> InfluenceResult:
        """columns: of the index, each [rows]."""
        found = self.found
        return InfluenceResult(
            proponents=self._hits(found.top_rows, found.top_scores, found.top_parts, checkpoints, columns),
            opponents=self._hits(found.bottom_rows, found.bottom_scores, found.bottom_parts, checkpoints, columns),
            method=method,
            target=" and ".join(dict.fromkeys(query.target for query in self.queries)),
            label=_common([query.label for query in self.queries]),
            prediction=_common([query.prediction for query in self.queries]),
            loss=float(np.mean(self.losses)),
            exact=found.exact,
            rows_touched=found.rows_touched,
            rows_searched=found.rows_searched,
            queries=len(self.queries),
            rows_rescored=self.rows_rescored,
            distribution=self.distribution,
        )

    def _hits(
        self,
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        parts: NDArray[np.float32],
        checkpoints: Sequence[str],
        columns: Mapping[str, NDArray[Any]],
    ) -> list[Hit]:
        return [
            Hit(
                row=row,
                score=score,
                parts=dict(zip(checkpoints, part, strict=True)),
                label=_plain(columns["label"][row]),
                prediction=_plain(columns["prediction"][row]),
                loss=float(columns["loss"][row]),
                correct=_plain(columns["correct"][row]),
                layers=self.layers.get(row),
                percentile=self.percentiles.get(row),
            )
            for row, score, part in zip(rows.tolist(), scores.tolist(), parts.tolist(), strict=True)
        ]


def _common(values: Sequence[Label | None]) -> Label | None:
    """What all values are; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _plain(value: Any) -> Any:
    """A column's value as a Python number; None where it is not known."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value
