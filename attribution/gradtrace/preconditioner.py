"""What Adam and its kin multiply a gradient by, in the coordinates of a basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradtrace.basis import Basis, ChosenCoordinates
from gradtrace.layers import Layer
from gradtrace.moments import SecondMoments


def preconditioner(layers: Sequence[Layer], basis: Basis, moments: SecondMoments) -> Tensor:
    """The diagonal, in the kept coordinates, of P = 1 / (sqrt(v) + eps). float32 [dimensions].

    A coordinate of a layer is a sum over its weights, sum_ij U_S[i, s] U_A[j, r] g_ij, so the diagonal there is
    sum_ij U_S[i, s]^2 U_A[j, r]^2 P_ij. That is all of P where the basis keeps weights as they are; else it leaves out
    by how much P mixes coordinates. Weights that had no gradient yet do not move: their P is 0.

    basis: spectral, or none
    """
    parts = {
        layer.name: chosen_diagonal(weight_matrix(layer, moments), chosen)
        for layer in layers
        if isinstance(chosen := basis.layers.get(layer.name), ChosenCoordinates)
    }
    return basis.assemble(parts, 1)[0]


def weight_matrix(layer: Layer, moments: SecondMoments) -> Tensor:
    """P of a layer's parameters as they stand in its gradient. float32 [groups, out, in]."""
    places = layer.parameter_gradients(torch.arange(layer.size).view(1, layer.groups, layer.outputs, layer.inputs))
    found = torch.zeros(layer.size)
    for name, place in places.items():
        if name in moments.by_name:
            found[place.flatten()] = 1 / (moments.by_name[name].flatten().sqrt() + moments.eps)
    return found.view(layer.groups, layer.outputs, layer.inputs)


def chosen_diagonal(matrix: Tensor, chosen: ChosenCoordinates) -> Tensor:
    """[groups, out, in] -> [1, k]: each kept coordinate's mean over the weights that it mixes."""
    if chosen.bases.outputs is not None:
        matrix = chosen.bases.outputs.cpu().square().mT @ matrix
    if chosen.bases.inputs is not None:
        matrix = matrix @ chosen.bases.inputs.cpu().square()
    return matrix.flatten()[chosen.kept.cpu()][None]
