"""Gradients divided by the root of Adam's second moments, parameter by parameter, before they are compressed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradtrace.basis.basis import Basis
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import check_finite
from gradtrace.errors import CheckpointError
from gradtrace.fitted.adam import factors_by_parameter, weight_matrix
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel


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
