"""What Adam and its kin multiply a gradient by, in the coordinates of a basis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradtrace.basis.basis import Basis, ChosenCoordinates
from gradtrace.checkpoints.second_moments import SecondMoments
from gradtrace.checkpoints.weights import listing, plain_names
from gradtrace.errors import CheckpointError
from gradtrace.layers import Layer
from gradtrace.models.gradient_model import GradientModel


def preconditioner(model: GradientModel, basis: Basis, moments: SecondMoments) -> Tensor:
    """The diagonal, in the kept coordinates, of P = 1 / (sqrt(v) + eps). float32 [dimensions].

    A coordinate of a layer is a sum over its weights, sum_ij U_S[i, s] U_A[j, r] g_ij, so the diagonal there is
    sum_ij U_S[i, s]^2 U_A[j, r]^2 P_ij. That is all of P where the basis keeps weights as they are; else it leaves out
    by how much P mixes coordinates. Weights that had no gradient yet do not move: their P is 0.

    basis: spectral, or none

    Raises:
        CheckpointError: the moments are of other parameters than the model's.
    """
    factors = factors_by_parameter(model, moments)
    parts = {
        layer.name: chosen_diagonal(weight_matrix(layer, factors), chosen)
        for layer in model.plan.layers
        if isinstance(chosen := basis.layers.get(layer.name), ChosenCoordinates)
    }
    return basis.assemble(parts, 1)[0]


def factors_by_parameter(model: GradientModel, moments: SecondMoments) -> dict[str, Tensor]:
    """1 / (sqrt(v) + eps) by the names of the model's parameters, each of its parameter's shape, without those that
    never had a gradient.

    Raises:
        CheckpointError: the moments are of other parameters than the model's.
    """
    parameters = dict(model.model.named_parameters())
    shapes = {name: parameters[key].shape for name, key in plain_names(parameters).items()}
    strange = [name for name, moment in moments.by_name.items() if shapes.get(name) != moment.shape]
    if strange:
        raise CheckpointError(
            f"the second moments of {model.checkpoint.path} are of other parameters than the model's "
            f"({listing(strange)}): restore the optimizer's file, or delete it to do without"
        )
    keys = plain_names(parameters)
    return {keys[name]: 1 / (moment.sqrt() + moments.eps) for name, moment in moments.by_name.items()}


def weight_matrix(layer: Layer, factors: Mapping[str, Tensor]) -> Tensor:
    """P of a layer's parameters as they stand in its gradient, 0 where there is none. float32 [groups, out, in].

    factors: by parameter name
    """
    places = layer.parameter_gradients(torch.arange(layer.size).view(1, layer.groups, layer.outputs, layer.inputs))
    found = torch.zeros(layer.size)
    for name, place in places.items():
        if name in factors:
            found[place.flatten()] = factors[name].flatten()
    return found.view(layer.groups, layer.outputs, layer.inputs)


def chosen_diagonal(matrix: Tensor, chosen: ChosenCoordinates) -> Tensor:
    """[groups, out, in] -> [1, k]: each kept coordinate's mean over the weights that it mixes."""
    if chosen.bases.outputs is not None:
        matrix = chosen.bases.outputs.cpu().square().mT @ matrix
    if chosen.bases.inputs is not None:
        matrix = matrix @ chosen.bases.inputs.cpu().square()
    return matrix.flatten()[chosen.kept.cpu()][None]
