"""Scores from sparse rows by position: of the coordinates that row and query both keep."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.data.batches import Measure
from gradtrace.layers import IDENTITY, Layer
from gradtrace.methods.position_scores import Lengths, PositionQuestion, PositionScores
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.position_coordinates import position_coordinates
from gradtrace.search.scored_rows import Doubles, Rows
from gradtrace.sparse.factors import Factors
from gradtrace.sparse.inverted_rows import InvertedRows
from gradtrace.sparse.vectors import SparseVectors
from gradtrace.task import Example


@dataclass(frozen=True, eq=False)
class Multipliers:
    """What the gradients of rows were multiplied by, and that of the query, which was multiplied by `scale`, too."""

    of_rows: Factors
    of_query: Factors
    scale: float


def split_block(
    store: InvertedRows,
    block: int,
    model: GradientModel,
    vector: SparseVectors,
    multipliers: Multipliers,
    question: PositionQuestion,
) -> PositionScores:
    """One block's part of the scores, before the rows' scale. vector: of the query at this block"""
    kept, stored = _common(store, block, question.rows, vector)
    asked, measure = values_at(vector, kept), model.measure(question.query.measure)
    training = []
    for values, example, lengths in zip(stored, question.examples, question.lengths, strict=True):
        of_row = values != 0
        gradients = _weights_by_position(model, example, lengths, kept[of_row])
        training.append(gradients @ (asked * _at(multipliers.of_rows, kept))[of_row])
    of_query = _at(multipliers.of_query, kept) * multipliers.scale
    query = [
        _weights_by_position(model, example, lengths, kept, measure) * of_query @ stored.T
        for example, lengths in zip(question.query.explained, question.query_lengths, strict=True)
    ]
    signed = [scores * (-1 if number else 1) for number, scores in enumerate(query)]
    return PositionScores(stored @ asked, training, signed)


def _common(store: InvertedRows, block: int, rows: Rows, vector: SparseVectors) -> tuple[NDArray[np.uint32], Doubles]:
    """The coordinates that the query and any of the rows keep, ascending [m], and the rows' stored values [n, m]."""
    order = np.argsort(rows)
    entries = store.gather(block, rows[order])
    common = values_at(vector, entries.coordinates) != 0
    kept, columns = np.unique(entries.coordinates[common], return_inverse=True)
    stored = np.zeros((len(rows), len(kept)))
    stored[order[entries.places[common]], columns] = entries.values[common]
    return kept, stored


def _weights_by_position(
    model: GradientModel,
    example: Example,
    lengths: Lengths,
    coordinates: NDArray[np.uint32],
    measure: Measure | None = None,
) -> Doubles:
    """An example's gradient by some weights at each position. float64 [positions, m].  coordinates: ascending [m]"""
    layers = model.plan.layers
    edges = np.cumsum([0, *(layer.size for layer in layers)])
    places = np.searchsorted(coordinates, edges)
    of_layer = {
        layer.name: torch.from_numpy(coordinates[low:high].astype(np.int64) - first).to(model.device)
        for layer, first, (low, high) in zip(layers, edges, pairwise(places), strict=False)
    }

    def of_use(layer: Layer, x: Tensor, d: Tensor) -> Tensor | None:
        chosen = of_layer[layer.name]
        return layer.coordinates(x, d, IDENTITY, chosen) if len(chosen) else None

    by_layer, _ = position_coordinates(model, model.batch([example]), lengths, of_use, measure)
    values = np.zeros((sum(lengths), len(coordinates)))
    for layer, (low, high) in zip(layers, pairwise(places), strict=True):
        if layer.name in by_layer:
            values[:, low:high] = by_layer[layer.name].double().cpu().numpy()
    return values


def values_at(query: SparseVectors, coordinates: NDArray[np.uint32]) -> Doubles:
    """The values of a single query there, 0 where it has none. [n]"""
    known, values = query.coordinates[0], query.values[0].astype(np.float64)
    places = np.minimum(np.searchsorted(known, coordinates), len(known) - 1)
    return np.where(known[places] == coordinates, values[places], 0.0)


def _at(factors: Factors, coordinates: NDArray[np.uint32]) -> Doubles:
    values: Doubles = factors[torch.from_numpy(coordinates.astype(np.int64))].double().numpy()
    return values
