"""Adam's preconditioner 1 / (sqrt(v) + eps): its diagonal in a basis for SOURCE, gradients times it for TracIn."""

from __future__ import annotations

from collections.abc import Mapping

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


def adam_factors(model: GradientModel) -> dict[str, Tensor]:
    """1 / (sqrt(v^) + eps) of every weight (Kingma and Ba 2015, Algorithm 1), zero for weights that the optimizer did
    not train. By layer name, each float32 [groups, out, in], on the model's device.

    Raises:
        CheckpointError: the checkpoint has no second moments, or they are of other parameters.
    """
    checkpoint = model.checkpoint
    moments = checkpoint.second_moments(model.task.model())
    if moments is None:
        raise CheckpointError(f"{checkpoint.path} has no second moments any more: restore the optimizer's file")
    factors = factors_by_parameter(model, moments)
    return {layer.name: weight_matrix(layer, factors).to(model.device) for layer in model.plan.layers}


def encode_preconditioned(
    model: GradientModel, basis: Basis, batch: ExampleBatch, measure: Measure, factors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """As `GradientModel.encode`, each weight's gradient times its factor. Holds whole gradients of a few examples.

    factors: by layer name, each [groups, out, in].

    Raises:
        LossError: a loss or a gradient is NaN or infinite.
    """
    found = full_gradients(model, batch, measure)
    parts: dict[str, Tensor] = {}
    for layer, uses in found.uses.items():
        if layer.name not in basis.layers:
            continue
        wholes = (layer.summed(uses, some).view(-1, *factors[layer.name].shape) for some in layer.slices(uses[0][0]))
        own, factor = basis.layers[layer.name], factors[layer.name]
        parts[layer.name] = torch.cat([own.of_gradient(whole * factor) for whole in wholes])
    basis.add_whole(parts, {layer: whole * factors[layer.name] for layer, whole in found.strays.items()})
    rows = basis.assemble(parts, len(found.losses))
    check_finite(rows, "gradient divided by Adam's second moments")
    return rows, found.losses
