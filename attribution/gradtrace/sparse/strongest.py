"""The strongest coordinates of each example's whitened gradient, over all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import check_finite
from gradtrace.errors import SharedPositionsError
from gradtrace.layers import IDENTITY, Layer
from gradtrace.models.full_gradients import FullGradients, full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.parts import in_parts
from gradtrace.sparse.factors import Factors
from gradtrace.sparse.vectors import LARGEST_COORDINATE, SparseRows, SparseVectors

_SAFE_NORM = 2.0**-40  # of float32 values, whose squares are then far from underflow where they count
_GROUPS = 8  # of coordinates, for each of those that are kept
_LARGEST_FLOAT = np.uint64(0x7FFFFFFF)  # the bits of a float without its sign


def strongest_coordinates(model: GradientModel, gradients: FullGradients, factors: Factors, count: int) -> SparseRows:
    """Of each example's gradient times the factors, the `count` coordinates of largest size.

    Of equally large ones the lower comes first. An example with fewer coordinates than that, other than zero, is
    filled with zeros. Takes the memory of one layer's gradient of some examples, and of one layer's factors.

    gradients: of the model;  factors: of all coordinates, in the order of the model's layers

    Raises:
        LossError: a gradient, times its factor, is NaN or infinite.
    """
    first = dict(zip(model.plan.layers, np.cumsum([0, *(layer.size for layer in model.plan.layers)]), strict=False))
    strongest = Strongest(len(gradients.losses), count)
    squares = torch.zeros(len(gradients.losses), dtype=torch.float64, device=gradients.losses.device)
    for layer in sorted(model.plan.layers, key=lambda layer: -layer.size):  # soon, most of what comes is too small
        of_layer = factors[first[layer] : first[layer] + layer.size].to(squares.device)
        for examples, positions, values in _gradients_of(layer, gradients):
            squares[examples] += _norms(values).square()
            values *= of_layer if positions is None else of_layer[positions]
            strongest.add(examples, int(first[layer]), positions, values)
    check_finite(strongest.largest, "whitened gradient")
    return SparseRows(strongest.vectors(), squares.sqrt().float().cpu().numpy())


def strongest_of_batches(
    model: GradientModel, batches: Sequence[ExampleBatch], measure: Measure | None, factors: Factors, count: int
) -> tuple[SparseRows, Tensor]:
    """The strongest coordinates of the examples' gradients, minus those of the same positions in further batches, and
    the values of the measure in the first [batch]. Raises as `strongest_coordinates` and `full_gradients`."""
    if len(batches) == 1:
        together = partial(_strongest_together, model, factors=factors, count=count)
        return in_parts(batches[0], measure or model.task.loss, together, _joined)
    return _strongest_of_differences(model, batches, measure, factors, count)


def _strongest_together(
    model: GradientModel, batch: ExampleBatch, measure: Measure, factors: Factors, count: int
) -> tuple[SparseRows, Tensor]:
    return _strongest_of_differences(model, [batch], measure, factors, count)


def _joined(rows: Sequence[SparseRows], places: Sequence[int]) -> SparseRows:
    joined, order = SparseRows.joined(rows), list(places)
    vectors = SparseVectors(joined.vectors.coordinates[order], joined.vectors.values[order])
    return SparseRows(vectors, joined.norms[order])


def _strongest_of_differences(
    model: GradientModel, batches: Sequence[ExampleBatch], measure: Measure | None, factors: Factors, count: int
) -> tuple[SparseRows, Tensor]:
    try:
        first, *subtracted = (full_gradients(model, batch, measure) for batch in batches)
    except SharedPositionsError:
        if len(batches[0]) == 1:
            raise
        examples = [[batch.alone(position) for batch in batches] for position in range(len(batches[0]))]
        alone = [_strongest_of_differences(model, example, measure, factors, count) for example in examples]
        return SparseRows.joined([rows for rows, _ in alone]), torch.cat([values for _, values in alone])
    gradients = reduce(FullGradients.minus, subtracted, first)
    return strongest_coordinates(model, gradients, factors, count), first.losses


@dataclass(frozen=True, eq=False)
class StrongestOfEach:
    """Rows keep `count` coordinates of their own.

    whitening: float32 [coordinates]
    """

    whitening: Tensor
    count: int

    def encode(self, model: GradientModel, batch: ExampleBatch, measure: Measure | None) -> tuple[SparseRows, Tensor]:
        return strongest_of_batches(model, [batch], measure, self.whitening, self.count)

    def placed(self, rows: SparseRows | None, places: Sequence[int], count: int) -> SparseRows:
        coordinates = np.zeros((count, self.count), np.uint32)
        values, norms = np.zeros((count, self.count), np.float32), np.zeros(count, np.float32)
        if rows is not None:
            at = list(places)
            coordinates[at], values[at], norms[at] = rows.vectors.coordinates, rows.vectors.values, rows.norms
        return SparseRows(SparseVectors(coordinates, values), norms)

    def norms(self, rows: SparseRows) -> list[float]:
        norms: list[float] = rows.norms.tolist()
        return norms


def _norms(values: Tensor) -> Tensor:
    """[e, n] -> float64 [e]. Squares of small values underflow in float32, where a pass in float64 takes six times as
    long."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1).double()
    if bool((norms < _SAFE_NORM).any()) or not bool(norms.isfinite().all()):
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    return norms


def _gradients_of(layer: Layer, gradients: FullGradients) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """A layer's gradients: the examples of a slice, the positions in the layer [n], and the values there [examples, n],
    which may be overwritten. Positions are None for all of the layer."""
    if layer in gradients.strays:
        values = gradients.strays[layer].flatten(1).clone()
        yield slice(0, len(values)), None, values
    elif layer in gradients.uses:
        for examples in layer.slices(gradients.uses[layer][0][0], in_cache=True):
            uses = [(x[examples], d[examples]) for x, d in gradients.uses[layer]]
            positions = layer.support(uses)
            if positions is None:
                yield examples, None, layer.summed(uses, slice(None))
            else:
                by_use = (layer.coordinates(x, d, IDENTITY, positions) for x, d in uses)
                yield examples, positions, reduce(torch.add, by_use)


class Strongest:
    """The coordinates of each example that may be among its strongest, of those so far.

    A size that is known to be reached by `count` coordinates of an example spares all that are smaller.

    largest: [examples], the size of the largest coordinate of each, NaN where one is NaN
    """

    def __init__(self, examples: int, count: int) -> None:
        self._examples, self._count = examples, count
        self.largest = torch.zeros(examples)
        self._reached = torch.full((examples,), torch.finfo(torch.float32).tiny)  # [examples]; zeros never count
        self._candidates: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []  # example and key of each

    def add(self, examples: slice, first: int, positions: Tensor | None, values: Tensor) -> None:
        """values: float32 [e, n], at the coordinates first + positions [n] (None: 0, 1, ...) of these examples"""
        self._reached, self.largest = self._reached.to(values.device), self.largest.to(values.device)
        sizes = values.abs()
        self.largest[examples] = torch.maximum(self.largest[examples], sizes.amax(dim=1))
        strong = sizes >= self._reached[examples, None]
        if int(torch.count_nonzero(strong)) > 2 * self._count * len(values):
            self._reached[examples] = torch.maximum(self._reached[examples], self._reached_in(sizes))
            strong = sizes >= self._reached[examples, None]
        example, place = strong.nonzero(as_tuple=True)
        chosen = values[example, place].cpu().numpy()
        coordinates = first + (place if positions is None else positions[place]).cpu().numpy()
        numbers = np.arange(self._examples)[examples]
        self._candidates.append((numbers[example.cpu().numpy()], _keys(chosen, coordinates)))

    def _reached_in(self, sizes: Tensor) -> Tensor:
        """A size that at least `count` of each example's reach, as near to their largest as is cheap to say. [e]

        The largest sizes of many groups are of as many coordinates. A group's coordinates are far from each other:
        neighbours are often large together.
        """
        e, n = sizes.shape
        width = max(1, n // (_GROUPS * self._count))
        groups = n // width
        if groups < self._count:
            return sizes.new_zeros(e)
        largest = sizes[:, : groups * width].view(e, width, groups).amax(dim=1)
        return largest.topk(self._count, dim=1).values[:, -1]

    def vectors(self) -> SparseVectors:
        """The strongest coordinates of each example, ascending."""
        shape = self._examples, self._count
        coordinates, values = np.full(shape, LARGEST_COORDINATE, np.uint32), np.zeros(shape, np.float32)
        for number, keys in enumerate(self._by_example()):
            kept, of_kept = _of_keys(np.sort(keys)[: self._count])
            ascending = kept.argsort()
            coordinates[number, : len(kept)], values[number, : len(kept)] = kept[ascending], of_kept[ascending]
        return SparseVectors(coordinates, values)

    def _by_example(self) -> list[NDArray[np.uint64]]:
        """The keys of each example's candidates."""
        none = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        examples, keys = (np.concatenate(side) for side in zip(none, *self._candidates, strict=True))
        counts = np.bincount(examples, minlength=self._examples)
        return np.split(keys[np.argsort(examples, kind="stable")], np.cumsum(counts)[:-1])


def _keys(values: NDArray[np.float32], coordinates: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Integers in the order of strength: 31 bits fall with the size, 32 are the coordinate, the last is the sign."""
    bits = values.view(np.uint32).astype(np.uint64)
    falling = _LARGEST_FLOAT - (bits & _LARGEST_FLOAT)
    keys: NDArray[np.uint64] = (
        falling << np.uint64(33) | coordinates.astype(np.uint64) << np.uint64(1) | bits >> np.uint64(31)
    )
    return keys


def _of_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Coordinates and values."""
    bits = _LARGEST_FLOAT - (keys >> np.uint64(33)) | (keys & np.uint64(1)) << np.uint64(31)
    return (keys >> np.uint64(1)).astype(np.uint32), bits.astype(np.uint32).view(np.float32)
