"""EK-FAC (George et al. 2018): each layer's Kronecker-factored eigenbasis, and corrected eigenvalues in it.

With inputs a and output gradients d of a layer, at labels sampled from the model, U_A are the eigenvectors of E[a aT]
and U_S those of E[d dT]. The spectral coordinates of a gradient d aT are U_S^T d aT U_A; an index keeps those whose
gradients at the true labels have the largest mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.basis import Basis, ChosenCoordinates
from gradtrace.data.batches import ExampleBatch
from gradtrace.fitted.fisher_batches import FisherBatch, fisher_batches
from gradtrace.layers import IDENTITY, Bases, Layer
from gradtrace.models.full_gradients import FullGradients, full_gradients, per_example
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Example

_WIDEST = 4096  # features above which the eigenvectors come from a sample of factors, not from an n x n matrix
_SKETCH = 1024  # eigenvectors that are kept of such a side
_POSITIONS = 1 << 14  # positions of a batch that estimate E[a aT] well enough


@dataclass
class _Side:
    """Second moment sum f fT of the factors f of one side of a layer; of wide sides, a sample of f instead.

    width: n, the length of f
    """

    width: int
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
            sides = [_sketched_eigenvectors(sample) for sample in torch.cat(self.sample, dim=1)]
            rank = max(side.shape[1] for side in sides)  # groups of lower rank get columns of zeros
            return torch.stack([F.pad(side, (0, rank - side.shape[1])) for side in sides])
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


def fit_eigenbases(model: GradientModel, batches: Iterator[FisherBatch]) -> dict[str, Bases]:
    """U_A and U_S of every layer that rotates, by layer name, from batches with labels sampled from the model.

    An embedding's input side keeps its own coordinates, tokens, in which E[a aT] is diagonal already.
    """
    inputs: dict[str, _Side] = {}
    outputs: dict[str, _Side] = {}

    def add(roots: Tensor, layer: Layer, x: Tensor, d: Tensor) -> None:
        """roots: [batch], of the examples' weights"""
        if not layer.rotates:
            return
        if layer.rotates_inputs:
            step = 1 + len(d) * layer.positions(d) // _POSITIONS
            sampled, sampled_roots = x[::step], roots[::step]
            for part in layer.slices(sampled):
                factors = layer.input_factors(sampled[part], None)
                side = inputs.setdefault(layer.name, _Side(layer.inputs))
                side.add(per_example(sampled_roots[part], factors) * factors)
        if layer.rotates_outputs:
            side = outputs.setdefault(layer.name, _Side(layer.outputs))
            side.add(layer.output_factors(per_example(roots, d) * d, None))

    for labelled in batches:
        model.backpropagate(labelled.batch, partial(add, labelled.weights.sqrt()), labelled.measure)
    return {
        name: Bases(*(side[name].eigenvectors() if name in side else None for side in (inputs, outputs)))
        for name in dict.fromkeys([*inputs, *outputs])
    }


def mean_squares(
    model: GradientModel, batches: Iterator[ExampleBatch], bases: Mapping[str, Bases]
) -> dict[str, Tensor]:
    """Mean square of every coordinate over the examples, by layer name. Each float32 [groups, s, r]."""
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        gradients = full_gradients(model, batch)
        count += len(gradients.losses)
        for name, squares in _squares(gradients, bases).items():
            sums[name] = sums[name] + squares if name in sums else squares
    return {name: total / count for name, total in sums.items()}


def _squares(gradients: FullGradients, bases: Mapping[str, Bases]) -> dict[str, Tensor]:
    """Sum over a batch of the squared coordinates, by layer name. Each [groups, s, r]."""
    squares = {
        layer.name: layer.squared_sum(uses, bases.get(layer.name, IDENTITY)) for layer, uses in gradients.uses.items()
    }
    return squares | {layer.name: gradient.square().sum(0) for layer, gradient in gradients.strays.items()}


def choose_coordinates(energies: Mapping[str, Tensor], bases: Mapping[str, Bases], dimensions: int, seed: int) -> Basis:
    """Keep the coordinates with the largest energy over all layers; columns are ordered by it, the largest first.

    energies: by layer name, each [groups, s, r]
    """
    order = torch.cat([energy.flatten() for energy in energies.values()]).argsort(descending=True, stable=True)
    order = order[:dimensions]
    chosen: dict[str, ChosenCoordinates] = {}
    start = 0  # the layer's first position in the concatenated energies
    for name, energy in energies.items():
        columns = ((order >= start) & (order < start + energy.numel())).nonzero().flatten()
        if len(columns):
            chosen[name] = _restricted(bases.get(name, IDENTITY), order[columns] - start, columns, energy.shape)
        start += energy.numel()
    return Basis("spectral", len(order), seed, chosen).to(torch.device("cpu"))


def _restricted(bases: Bases, positions: Tensor, columns: Tensor, shape: Sequence[int]) -> ChosenCoordinates:
    """Only the eigenvectors that kept coordinates use, and the positions [k] among these.  shape: groups, s, r"""
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
    labelled: Callable[[GradientModel], Iterator[FisherBatch]],
    dimensions: int,
    seed: int,
) -> Basis:
    """Eigenbases from the reference checkpoint, choice of coordinates from the true gradients at all checkpoints."""
    bases = fit_eigenbases(reference, labelled(reference))
    energies: dict[str, Tensor] = {}
    for model in models():
        for name, energy in mean_squares(model, batches(), bases).items():
            energies[name] = energies[name] + energy if name in energies else energy
    in_order = {layer.name: energies[layer.name] for layer in reference.plan.layers if layer.name in energies}
    return choose_coordinates(in_order, bases, dimensions, seed)


def curvature(model: GradientModel, basis: Basis, samples: Iterable[Sequence[Example]], seed: int) -> dict[str, Tensor]:
    """Corrected eigenvalues of the Fisher information at one checkpoint (George et al. 2018, Equation 8).

    lambda_k = E[g_k^2], with g_k the gradient's coordinate k in the basis, at labels sampled from the model.

    Returns:
        eigenvalues: float32 [dimensions], lambda.
        layer_means: float32 [layers of the basis, in alphabetical order], mean eigenvalue over all coordinates of each.
    """
    total, count = torch.zeros(basis.dimensions, dtype=torch.float64), 0.0
    traces = dict.fromkeys(sorted(basis.layers), 0.0)
    for labelled in fisher_batches(model, samples, seed):
        gradients = full_gradients(model, labelled.batch, labelled.measure).times(labelled.weights.sqrt())
        coordinates: dict[str, Tensor] = {}
        for layer, uses in gradients.uses.items():
            for x, d in uses:
                basis.add_use(coordinates, layer, x, d)
        basis.add_whole(coordinates, gradients.strays)
        total += basis.assemble(coordinates, len(gradients.losses)).square().sum(0).double().cpu()
        count += float(labelled.weights.sum())
        for name, squares in _squares(gradients, {}).items():
            if name in traces:
                traces[name] += float(squares.sum()) / squares.numel()
    return {
        "eigenvalues": (total / count).float(),
        "layer_means": torch.tensor(list(traces.values()), dtype=torch.float32) / count,
    }
