"""Spectral coordinates: each layer's gradient in the eigenbasis of its Kronecker-factored curvature.

As in EK-FAC (George et al. 2018): U_A are the eigenvectors of E[a aT], U_S those of E[d dT], the coordinates of a
gradient d aT are U_S^T d aT U_A. Kept are the coordinates whose gradients have the largest mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.basis import Basis, ChosenCoordinates
from gradtrace.data.batches import ExampleBatch
from gradtrace.fitted.fisher_batches import FisherBatch
from gradtrace.layers import IDENTITY, Bases, Layer
from gradtrace.models.full_gradients import FullGradients, full_gradients, per_example
from gradtrace.models.gradient_model import GradientModel

_WIDEST = 4096  # features above which the eigenvectors come from a sample of factors, not from an n x n matrix
_SKETCH = 1024  # eigenvectors that are kept of such a side
_POSITIONS = 1 << 14  # positions of a batch that estimate E[a aT] well enough


@dataclass
class _Side:
    """Second moment of one side of a layer, or, for wide sides, a sample of its factors."""

    width: int
    groups: int
    moment: Tensor | None = None  # [groups, n, n]
    sample: list[Tensor] = field(default_factory=list)  # each [groups, m, n]

    def add(self, factors: Tensor) -> None:
        """factors: [batch, groups, positions, n]."""
        flat = factors.transpose(0, 1).flatten(1, 2)  # [groups, batch * positions, n]
        if self.width > _WIDEST:
            self.sample.append(flat[:, :: max(1, flat.shape[1] // 64)].clone())
            return
        product = flat.transpose(1, 2) @ flat
        self.moment = product if self.moment is None else self.moment.add_(product)

    def eigenvectors(self) -> Tensor:
        """Columns by falling eigenvalue. [groups, n, r]."""
        if self.moment is None:
            found = [_sketched_eigenvectors(sample) for sample in torch.cat(self.sample, dim=1)]
            rank = max(side.shape[1] for side in found)  # groups of lower rank get columns of zeros
            return torch.stack([F.pad(side, (0, rank - side.shape[1])) for side in found])
        vectors: Tensor = torch.linalg.eigh(self.moment.double())[1]
        return vectors.flip(-1).float()


def _sketched_eigenvectors(sample: Tensor) -> Tensor:
    """Leading right singular vectors of a sample [m, n], through its m x m Gram matrix. [n, r]."""
    sample = sample[:: max(1, len(sample) // (2 * _SKETCH))].double()
    values, vectors = torch.linalg.eigh(sample @ sample.T)
    kept = values > values.max() * 1e-10
    values, vectors = values[kept].flip(0)[:_SKETCH], vectors[:, kept].flip(1)[:, :_SKETCH]
    singular: Tensor = sample.T @ vectors / values.sqrt()
    return singular.float()


def fit_eigenbases(model: GradientModel, batches: Iterator[FisherBatch]) -> dict[Layer, Bases]:
    """Eigenvectors of both sides of every layer that rotates, over batches with labels from the model.

    An embedding's input side keeps its own basis, tokens, in which E[a aT] is diagonal already.
    """
    inputs: dict[Layer, _Side] = {}
    outputs: dict[Layer, _Side] = {}

    def add(roots: Tensor, layer: Layer, x: Tensor, d: Tensor) -> None:
        if not layer.rotates:
            return
        if layer.rotates_inputs:
            step = 1 + len(d) * layer.positions(d) // _POSITIONS
            some, roots_of_some = x[::step], roots[::step]
            for part in layer.slices(some):
                side = inputs.setdefault(layer, _Side(layer.inputs, layer.groups))
                factors = layer.input_factors(some[part], None)
                side.add(per_example(roots_of_some[part], factors) * factors)
        if layer.rotates_outputs:
            side = outputs.setdefault(layer, _Side(layer.outputs, layer.groups))
            side.add(layer.output_factors(per_example(roots, d) * d, None))

    for labelled in batches:
        model.backpropagate(labelled.batch, partial(add, labelled.weights.sqrt()), labelled.measure)
    return {
        layer: Bases(*(side[layer].eigenvectors() if layer in side else None for side in (inputs, outputs)))
        for layer in dict.fromkeys([*inputs, *outputs])
    }


def mean_squares(
    model: GradientModel, batches: Iterator[ExampleBatch], bases: Mapping[Layer, Bases]
) -> dict[Layer, Tensor]:
    """Mean square of every coordinate of every layer over the examples. Each float32 [groups, s, r]."""
    sums: dict[Layer, Tensor] = {}
    count = 0
    for batch in batches:
        found = full_gradients(model, batch)
        count += len(found.losses)
        for layer, square in squares(found, bases).items():
            sums[layer] = sums[layer] + square if layer in sums else square
    return {layer: total / count for layer, total in sums.items()}


def squares(gradients: FullGradients, bases: Mapping[Layer, Bases]) -> dict[Layer, Tensor]:
    """Sum over a batch of the squared coordinates. Each [groups, s, r]."""
    found = {layer: layer.squared_sum(own, bases.get(layer, IDENTITY)) for layer, own in gradients.uses.items()}
    return found | {layer: gradient.square().sum(0) for layer, gradient in gradients.strays.items()}


def choose_coordinates(
    energies: Mapping[Layer, Tensor], bases: Mapping[Layer, Bases], dimensions: int, seed: int
) -> Basis:
    """Keep the coordinates with the largest energy over all layers; columns are ordered by it, the largest first."""
    layers = list(energies)
    flat = torch.cat([energies[layer].flatten() for layer in layers])
    order = flat.argsort(descending=True, stable=True)[:dimensions]
    starts = torch.tensor([energies[layer].numel() for layer in layers]).cumsum(0)
    owner = torch.bucketize(order, starts.to(order.device), right=True)
    chosen: dict[str, ChosenCoordinates] = {}
    for number, layer in enumerate(layers):
        columns = (owner == number).nonzero().flatten()
        if len(columns):
            positions = order[columns] - (starts[number] - energies[layer].numel())
            chosen[layer.name] = _restricted(bases.get(layer, IDENTITY), positions, columns, energies[layer].shape)
    return Basis("spectral", len(order), seed, chosen).to(torch.device("cpu"))


def _restricted(bases: Bases, positions: Tensor, columns: Tensor, shape: Sequence[int]) -> ChosenCoordinates:
    """Only the eigenvectors that some kept coordinate uses, and the positions among these."""
    _, s, r = shape
    group, row, column = positions // (s * r), positions // r % s, positions % r
    if bases.outputs is not None:
        used, row = row.unique(return_inverse=True)
        bases, s = Bases(bases.inputs, bases.outputs[:, :, used]), len(used)
    if bases.inputs is not None:
        used, column = column.unique(return_inverse=True)
        bases, r = Bases(bases.inputs[:, :, used], bases.outputs), len(used)
    return ChosenCoordinates(bases, (group * s + row) * r + column, columns)


def fit_spectral_basis(
    models: Callable[[], Iterator[GradientModel]],
    reference: GradientModel,
    batches: Callable[[], Iterator[ExampleBatch]],
    fisher_batches: Callable[[GradientModel], Iterator[FisherBatch]],
    dimensions: int,
    seed: int,
) -> Basis:
    """Rotation from the reference checkpoint, choice of coordinates from the true gradients of all checkpoints."""
    bases = fit_eigenbases(reference, fisher_batches(reference))
    by_name = {layer.name: found for layer, found in bases.items()}
    energies: dict[str, Tensor] = {}
    for model in models():
        own = {layer: by_name[layer.name] for layer in model.plan.layers if layer.name in by_name}
        for layer, energy in mean_squares(model, batches(), own).items():
            energies[layer.name] = energies[layer.name] + energy if layer.name in energies else energy
    layers = [layer for layer in reference.plan.layers if layer.name in energies]
    return choose_coordinates({layer: energies[layer.name] for layer in layers}, bases, dimensions, seed)
