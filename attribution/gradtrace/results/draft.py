"""A result in the making: what is known of one query's hits so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.methods.method import Method
from gradtrace.models.queries import Query
from gradtrace.results.distribution import Distribution, describe, percentiles
from gradtrace.results.hits import Hit, InfluenceResult, Recall
from gradtrace.results.notes import note_on_few_rows, note_on_missing, note_on_zero
from gradtrace.search.progressive import SearchResult
from gradtrace.store.row_ids import RowIds
from gradtrace.task import Label


@dataclass(slots=True)
class Draft:
    """The result for the mean of some queries, mostly of one. What was not asked for stays empty.

    Rows go by their positions in the store until the result names them.
    """

    queries: Sequence[Query]
    losses: Sequence[float]
    found: SearchResult
    silent: bool  # whether the query's vector is zero, so that every score is
    rows_rescored: int = 0
    layers: dict[int, dict[str, float]] = field(default_factory=dict)  # position -> layer name -> share of the score
    percentiles: dict[int, float] = field(default_factory=dict)  # position -> percentile
    distribution: Distribution | None = None

    @property
    def positions(self) -> NDArray[np.int64]:
        """Those of both ends, ascending."""
        return np.union1d(self.found.top_rows, self.found.bottom_rows)

    def share_by_layer(self, positions: NDArray[np.int64], layers: Mapping[str, NDArray[np.float64]]) -> None:
        """layers: by name the shares [m] in the scores of the rows at `positions` [m]."""
        shares = zip(*(layer.tolist() for layer in layers.values()), strict=True)
        named = (dict(zip(layers, own, strict=True)) for own in shares)
        self.layers = dict(zip(positions.tolist(), named, strict=True))

    def place_among(self, scores: NDArray[np.float32], live: NDArray[np.bool_]) -> None:
        """scores: [stored rows], overwritten where exact ones are known;  live: bool [stored rows], not deleted."""
        positions, found = self.positions, self.found
        if self.rows_rescored:
            scores[found.top_rows], scores[found.bottom_rows] = found.top_scores, found.bottom_scores
        counted = scores[live]
        self.distribution = describe(counted)
        places = percentiles(counted, scores[positions]).tolist()
        self.percentiles = dict(zip(positions.tolist(), places, strict=True))

    def result(
        self,
        method: Method,
        checkpoints: Sequence[str],
        k: int,
        recall: Recall | None,
        row_ids: RowIds,
        columns: Mapping[str, NDArray[Any]],
    ) -> InfluenceResult:
        """recall: of an approximate searcher;  columns: of the index, each [stored rows]."""
        found = self.found
        top, bottom = _kept(found.top_scores, method), _kept(-found.bottom_scores, method)
        ends = [
            self._hits(rows[kept], scores[kept], parts[kept], checkpoints, row_ids, columns)
            for rows, scores, parts, kept in (
                (found.top_rows, found.top_scores, found.top_parts, top),
                (found.bottom_rows, found.bottom_scores, found.bottom_parts, bottom),
            )
        ]
        return InfluenceResult(
            proponents=ends[0],
            opponents=ends[1],
            method=method.name,
            target=" and ".join(dict.fromkeys(query.target for query in self.queries)),
            label=_common([query.label for query in self.queries]),
            prediction=_common([query.prediction for query in self.queries]),
            loss=float(np.mean(self.losses)),
            exact=found.exact,
            recall=None if found.exact else recall,
            rows_touched=found.rows_touched,
            rows_searched=found.rows_searched,
            queries=len(self.queries),
            rows_rescored=self.rows_rescored,
            distribution=self.distribution,
            note=self._note(method, len(ends[0]), len(ends[1]), k),
        )

    def _note(self, method: Method, proponents: int, opponents: int, k: int) -> str | None:
        if self.silent:
            kind = "gradient" if method.compares_gradients else "representation"
            return note_on_zero(kind, len(self.queries), float(np.mean(self.losses)))
        if not method.signed:
            return note_on_few_rows(self.found, k)
        return note_on_missing(self.found, proponents, opponents, k, self.rows_rescored)

    def _hits(
        self,
        positions: NDArray[np.int64],
        scores: NDArray[np.float32],
        parts: NDArray[np.float32],
        checkpoints: Sequence[str],
        row_ids: RowIds,
        columns: Mapping[str, NDArray[Any]],
    ) -> list[Hit]:
        numbered = zip(positions.tolist(), row_ids.of(positions).tolist(), strict=True)
        return [
            Hit(
                row=row,
                score=score,
                parts=dict(zip(checkpoints, part, strict=True)),
                label=_plain(columns["label"][position]),
                prediction=_plain(columns["prediction"][position]),
                loss=float(columns["loss"][position]),
                correct=_plain(columns["correct"][position]),
                layers=self.layers.get(position),
                percentile=self.percentiles.get(position),
            )
            for (position, row), score, part in zip(numbered, scores.tolist(), parts.tolist(), strict=True)
        ]


def _kept(scores: NDArray[np.float32], method: Method) -> NDArray[np.bool_]:
    """Which hits stand at the end that they were found for.  scores: [m], those of the other end negated"""
    return scores > 0 if method.signed else np.ones(len(scores), dtype=np.bool_)


def _common(values: Sequence[Label | None]) -> Label | None:
    """What all values are; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _plain(value: Any) -> Any:
    """A column's value as a Python number; None where it is not known."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value
