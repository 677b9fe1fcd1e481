"""Rescoring: scores of a search's candidates from full, uncompressed gradients, recomputed at query time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.errors import QueryError
from gradtrace.methods.method import Scoring
from gradtrace.methods.norms import inverse
from gradtrace.methods.vectors import mean_vector
from gradtrace.models.full_gradients import FullGradients, full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import Query, explained_batches, query_batches
from gradtrace.models.task_model import MeasureName
from gradtrace.search.scored_rows import Doubles, Rows, SearchResult, both_ends
from gradtrace.task import Example

CANDIDATES = 2  # the compressed search returns this many times k rows at either end

_ROW_BATCH = 64
_RESULTS_TOGETHER = 16  # shared candidates are differentiated once, but all pairs of query and candidate multiplied


@dataclass(frozen=True, slots=True)
class Prefilter:
    """Candidates that another method finds alike, in place of the search's.

    scoring: of that method;  candidates: the number for each result
    """

    scoring: Scoring[Any]
    candidates: int

    def found(self, queries: Sequence[Query], mean: bool, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        """The same rows at both ends. mean: of all queries, which share one result"""
        vectors, _ = self.scoring.query_vectors(queries)
        results = self.scoring.search(mean_vector(vectors) if mean else vectors, self.candidates, allowed)
        return [replace(result, bottom=result.top, exact=False) for result in results]


@dataclass(frozen=True, slots=True)
class Rescored:
    """Both ends by exact score, and what each candidate's score consists of by layer.

    rows: int64 [m], ascending;  layers: by name float64 [m], summing to the scores
    """

    ends: SearchResult
    rows: Rows
    layers: Mapping[str, Doubles]


def rescored(
    contents: IndexContents,
    scoring: Scoring[Any],
    groups: Sequence[Sequence[Query]],
    compressed: Sequence[SearchResult],
    k: int,
) -> list[Rescored]:
    """Score the compressed search's candidates by full gradients, and keep the best k at either end.

    Args:
        scoring: of a method with `full_gradient_weights`.
        groups: for each result its queries, of whose scores the mean is taken.
        compressed: for each result both ends by its compressed scores.

    Raises:
        LossError: a loss is NaN or infinite.
    """
    results = []
    for start in range(0, len(groups), _RESULTS_TOGETHER):
        together = slice(start, start + _RESULTS_TOGETHER)
        candidates = [np.union1d(result.top.rows, result.bottom.rows) for result in compressed[together]]
        union = np.unique(np.concatenate(candidates))
        queries = [query for group in groups[together] for query in group]
        examples = fetch(contents.task.train, contents.store.row_ids.ids[union].tolist())
        scores = _scores([contents.models[block] for block in scoring.blocks], scoring, queries, examples)
        first = 0
        for group, rows, result in zip(groups[together], candidates, compressed[together], strict=True):
            asked, at = slice(first, first + len(group)), np.searchsorted(union, rows)
            by_layer = {name: layer[:, asked, at].mean(1).numpy() for name, layer in scores.items()}  # [C, m]
            parts = sum(by_layer.values(), np.zeros((len(scoring.blocks), len(rows)))).T  # [m, C]
            top, bottom = both_ends(rows, parts, k)
            shares = {name: layer.sum(axis=0) for name, layer in by_layer.items()}
            results.append(Rescored(replace(result, top=top, bottom=bottom), rows, shares))
            first += len(group)
    return results


def _scores(
    models: Sequence[GradientModel], scoring: Scoring[Any], queries: Sequence[Query], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """Every query's score on every training example by layer and checkpoint. Each float64 [C, queries, examples].

    models: at the scoring's blocks
    """
    zeros = partial(torch.zeros, dtype=torch.float64)
    products: dict[str, Tensor] = defaultdict(partial(zeros, len(models), len(queries), len(examples)))
    query_squares, row_squares = zeros(len(models), len(queries)), zeros(len(models), len(examples))
    for checkpoint, model in enumerate(models):
        for numbers, measure in query_batches(model, queries):
            if measure == "measurement" and not model.examination.measurement:
                raise QueryError(
                    "the measurement could not be tried on training examples, nor on task.query: leave rescore out, or "
                    "give the task a query data set that has what it needs"
                )
            query_gradients = _explained_gradients(model, [queries[number] for number in numbers], measure)
            for start in range(0, len(examples), _ROW_BATCH):
                rows = slice(start, start + _ROW_BATCH)
                row_gradients = full_gradients(model, model.batch(examples[rows]))
                for name, layer in query_gradients.inner_products(row_gradients).items():
                    products[name][checkpoint, numbers, rows] = layer.double().cpu()
                if scoring.normalized:
                    query_squares[checkpoint, numbers] = query_gradients.squared_norms().cpu()
                    row_squares[checkpoint, rows] = row_gradients.squared_norms().cpu()
    assert scoring.full_gradient_weights is not None  # else the question was refused
    factors = torch.from_numpy(scoring.full_gradient_weights)[:, None, None]
    if scoring.normalized:  # over all checkpoints together, as the rows of an index are
        query_norms, row_norms = query_squares.sum(0).sqrt(), row_squares.sum(0).sqrt()
        factors = factors * inverse(query_norms)[:, None] * inverse(row_norms)
    return {name: values * factors for name, values in products.items()}


def _explained_gradients(model: GradientModel, queries: Sequence[Query], measure: MeasureName) -> FullGradients:
    """Of a batch of queries, of one measure."""
    batches = explained_batches(model, queries)
    first, *subtracted = (full_gradients(model, batch, model.measure(measure)) for batch in batches)
    return reduce(FullGradients.minus, subtracted, first)
