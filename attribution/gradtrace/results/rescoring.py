"""Rescoring: full, uncompressed gradients of a search's candidates, recomputed at query time, and scores from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import QueryError
from gradtrace.methods.tracin import inverse
from gradtrace.models.full_gradients import FullGradients, full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import Query, query_batches
from gradtrace.search.scored_rows import SearchResult, both_ends
from gradtrace.task import Example

CANDIDATES = 2  # so many times k rows are taken from either end of the compressed search

_ROW_BATCH = 64
_RESULTS_TOGETHER = 16  # candidates that their queries share are differentiated once; others are multiplied in vain

Rows = NDArray[np.int64]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rescored:
    """Both ends by exact score, and what each candidate's score consists of by layer.

    rows: int64 [m], ascending;  layers: by name float64 [m], summing to the scores
    """

    found: SearchResult
    rows: Rows
    layers: Mapping[str, Doubles]


def rescored(
    models: Sequence[GradientModel],
    weights: Doubles,
    normalized: bool,
    groups: Sequence[Sequence[Query]],
    found: Sequence[SearchResult],
    k: int,
    examples: Callable[[Rows], Sequence[Example]],
) -> list[Rescored]:
    """Score what the compressed search found by full gradients, and keep the best k at either end.

    Args:
        models: of the chosen checkpoints.
        weights: float64 [models], of their inner products.
        normalized: divide by the norms of query and row.
        groups: for each result its queries, of whose scores the mean is taken.
        examples: reads the training examples of rows [m].

    Raises:
        LossError: a loss is NaN or infinite.
    """
    results = []
    for start in range(0, len(groups), _RESULTS_TOGETHER):
        some = slice(start, start + _RESULTS_TOGETHER)
        rows = [np.union1d(one.top.rows, one.bottom.rows) for one in found[some]]
        union = np.unique(np.concatenate(rows))
        queries = [query for group in groups[some] for query in group]
        scores = _scores(models, weights, normalized, queries, examples(union))
        first = 0
        for group, own, one in zip(groups[some], rows, found[some], strict=True):
            mine, at = slice(first, first + len(group)), np.searchsorted(union, own)
            by_layer = {name: layer[:, mine, at].mean(1).numpy() for name, layer in scores.items()}  # [C, m]
            results.append(_best(one, own, by_layer, k))
            first += len(group)
    return results


def _best(found: SearchResult, rows: Rows, by_layer: Mapping[str, Doubles], k: int) -> Rescored:
    """by_layer: float64 [C, m];  rows: [m], ascending."""
    parts = sum(by_layer.values(), np.zeros((found.top.parts.shape[1], len(rows)))).T  # [m, C]
    counts = {"touched": found.rows_touched, "searched": found.rows_searched}
    ends = both_ends(rows, parts, k, exact=found.exact, **counts)
    return Rescored(ends, rows, {name: layer.sum(axis=0) for name, layer in by_layer.items()})


def _scores(
    models: Sequence[GradientModel],
    weights: Doubles,
    normalized: bool,
    queries: Sequence[Query],
    examples: Sequence[Example],
) -> dict[str, Tensor]:
    """Every query's score on every training example by layer and checkpoint. Each float64 [C, queries, examples]."""
    pairs = _Pairs(len(models), len(queries), len(examples), normalized)
    for checkpoint, model in enumerate(models):
        for mine, measure in query_batches(model, queries):
            if measure == "measurement" and not model.examination.measurement:
                raise QueryError(
                    "the measurement could not be tried on training examples, nor on task.query: leave rescore out, or "
                    "give the task a query data set that has what it needs"
                )
            asked_batch = model.batch([queries[number].example for number in mine])
            asked = full_gradients(model, asked_batch, model.measure(measure))
            for start in range(0, len(examples), _ROW_BATCH):
                some = range(start, min(start + _ROW_BATCH, len(examples)))
                others = full_gradients(model, model.batch([examples[number] for number in some]))
                pairs.add(checkpoint, mine, asked, some, others)
    return pairs.scores(torch.from_numpy(weights))


class _Pairs:
    """Inner products of the gradients of queries and rows at every checkpoint, and their norms where wanted."""

    def __init__(self, checkpoints: int, queries: int, rows: int, normalized: bool) -> None:
        self._shape, self._normalized = (checkpoints, queries, rows), normalized
        self._by_layer: dict[str, Tensor] = {}  # each [C, queries, rows], float64 as all
        self._query_squares = torch.zeros(checkpoints, queries, dtype=torch.float64)
        self._row_squares = torch.zeros(checkpoints, rows, dtype=torch.float64)

    def add(
        self, checkpoint: int, mine: Sequence[int], asked: FullGradients, some: Sequence[int], others: FullGradients
    ) -> None:
        """The products of the queries `mine` with the rows `some`."""
        for name, products in asked.inner_products(others).items():
            if name not in self._by_layer:
                self._by_layer[name] = torch.zeros(self._shape, dtype=torch.float64)
            self._by_layer[name][checkpoint, mine, some[0] : some[-1] + 1] = products.double().cpu()
        if self._normalized:
            self._query_squares[checkpoint, mine] = asked.squared_norms().cpu()
            self._row_squares[checkpoint, some] = others.squared_norms().cpu()

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """weights: float64 [C]. Each float64 [C, queries, rows]."""
        factors = weights[:, None, None]
        if self._normalized:  # over all checkpoints together, as the rows of an index are
            norms = [squares.sum(0).sqrt() for squares in (self._query_squares, self._row_squares)]
            factors = factors * inverse(norms[0])[:, None] * inverse(norms[1])
        return {name: products * factors for name, products in self._by_layer.items()}
