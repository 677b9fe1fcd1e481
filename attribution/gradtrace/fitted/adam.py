"""Adam's preconditioner P = diag(1 / (sqrt(v) + eps)), v the second moments (Kingma and Ba 2015, Algorithm 1).

SOURCE takes its diagonal in the coordinates of a basis; TracIn for Adam multiplies whole gradients by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradtrace.basis import Basis, ChosenCoordinates
from gradtrace.checkpoints.second_moments import SecondMoments
from gradtrace.checkpoints.weights import listing, plain_names
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import check_finite
from gradtrace.errors import CheckpointError
from gradtrace.layers import Layer
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.position_coordinates import position_coordinates
from gradtrace.task import Example


def weight_preconditioner(model: GradientModel, moments: SecondMoments) -> Tensor:
    """P itself: of all weights, in the order of the model's layers. float32 [weights], on the CPU.

    Raises:
        CheckpointError: the moments are of other parameters than the model's.
    """
    return torch.cat([matrix.flatten() for _, matrix in _by_layer(model, moments)])


def preconditioner(model: GradientModel, basis: Basis, moments: SecondMoments) -> Tensor:
    """The diagonal of P in the kept coordinates. float32 [dimensions].

    Coordinate (s, r) of a layer is sum_ij U_S[i, s] U_A[j, r] g_ij, so its diagonal element is
    sum_ij U_S[i, s]^2 U_A[j, r]^2 P_ij. That is all of P where the basis does not rotate (`none`); else the elements
    of P between different coordinates are left out, as they are once more where the coordinates are rotated together.

    basis: gauss-newton, spectral or none

    Raises:
        CheckpointError: the moments are of other parameters than the model's.
    """
    diagonals = {
        name: _diagonal(matrix, chosen)
        for name, matrix in _by_layer(model, moments)
        if isinstance(chosen := basis.layers.get(name), ChosenCoordinates)
    }
    squared = None if basis.rotation is None else basis.rotation.square()
    return replace(basis, rotation=squared).assemble(diagonals, 1)[0]


def _by_layer(model: GradientModel, moments: SecondMoments) -> Iterator[tuple[str, Tensor]]:
    """Each layer's name and its P in the shape of the layer's gradient, float32 [groups, out, in], on the CPU.

    It is zero for weights without second moments, which the optimizer has never moved.

    Raises:
        CheckpointError: the moments are of other parameters than the model's.
    """
    by_name = _by_parameter(model, moments)
    factors = {name: 1 / (moment.sqrt() + moments.eps) for name, moment in by_name.items()}
    for layer in model.plan.layers:
        yield layer.name, layer.from_parameters(factors)


def _by_parameter(model: GradientModel, moments: SecondMoments) -> dict[str, Tensor]:
    """The second moments by the names of the model's parameters. Raises as `_by_layer`."""
    parameters = dict(model.model.named_parameters())
    keys = plain_names(parameters)
    shapes = {name: parameters[key].shape for name, key in keys.items()}
    unknown = [name for name, moment in moments.by_name.items() if shapes.get(name) != moment.shape]
    if unknown:
        raise CheckpointError(
            f"the second moments of {model.checkpoint.path} are of other parameters than the model's "
            f"({listing(unknown)}): restore the optimizer's file, or delete it to do without"
        )
    return {keys[name]: moment for name, moment in moments.by_name.items()}


def _diagonal(matrix: Tensor, chosen: ChosenCoordinates) -> Tensor:
    """The kept elements of (U_S^2)^T P U_A^2, with squares of elements. [groups, out, in] -> [1, k]."""
    if chosen.bases.outputs is not None:
        matrix = chosen.bases.outputs.cpu().square().mT @ matrix
    if chosen.bases.inputs is not None:
        matrix = matrix @ chosen.bases.inputs.cpu().square()
    return matrix.flatten()[chosen.kept.cpu()][None]


def adam_factors(model: GradientModel) -> dict[str, Tensor]:
    """P by layer name, each float32 [groups, out, in] on the model's device; zero for weights that were not trained.

    Raises:
        CheckpointError: the checkpoint has no second moments, or they are of other parameters.
    """
    return {name: matrix.to(model.device) for name, matrix in _by_layer(model, _moments(model))}


def _moments(model: GradientModel) -> SecondMoments:
    moments = model.checkpoint.second_moments(model.task.model())
    if moments is None:
        raise CheckpointError(f"{model.checkpoint.path} has no second moments any more: restore the optimizer's file")
    return moments


def encode_preconditioned(
    model: GradientModel, basis: Basis, batch: ExampleBatch, measure: Measure, factors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """As `GradientModel.encode`, of P times the gradient g: rows [batch, dimensions] and losses [batch].

    Holds whole gradients of a few examples at a time.

    factors: P by layer name, each [groups, out, in]

    Raises:
        LossError: a loss or a gradient is NaN or infinite.
    """
    gradients = full_gradients(model, batch, measure)
    coordinates: dict[str, Tensor] = {}
    for layer, uses in gradients.uses.items():
        if layer.name in basis.layers:
            layer_basis, factor = basis.layers[layer.name], factors[layer.name]
            wholes = (layer.summed(uses, part).view(-1, *factor.shape) for part in layer.slices(uses[0][0]))
            coordinates[layer.name] = torch.cat([layer_basis.of_gradient(whole * factor) for whole in wholes])
    basis.add_whole(coordinates, {layer: whole * factors[layer.name] for layer, whole in gradients.strays.items()})
    rows = basis.assemble(coordinates, len(gradients.losses))
    check_finite(rows, "gradient divided by Adam's second moments")
    return rows, gradients.losses


def encode_preconditioned_positions(
    model: GradientModel,
    basis: Basis,
    example: Example,
    lengths: Sequence[int],
    measure: Measure,
    factors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """As `encode_preconditioned`, of one example by position: rows [positions, dimensions] and the value [1].

    lengths: see `position_coordinates`, which names the errors raised, too
    """

    def of_use(layer: Layer, x: Any, d: Tensor) -> Tensor | None:
        if layer.name not in basis.layers:
            return None
        layer_basis, factor = basis.layers[layer.name], factors[layer.name]
        wholes = (layer.gradient(x[part], d[part]) for part in layer.slices(x))
        return torch.cat([layer_basis.of_gradient(whole.view(-1, *factor.shape) * factor) for whole in wholes])

    coordinates, value = position_coordinates(model, model.batch([example]), lengths, of_use, measure)
    rows = basis.assemble(coordinates, sum(lengths))
    check_finite(rows, "gradient divided by Adam's second moments")
    return rows, value
