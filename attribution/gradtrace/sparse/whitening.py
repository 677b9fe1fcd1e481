"""Whitening by single weights: the coordinates of a gradient divided by their usual size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.data.batches import ExampleBatch
from gradtrace.errors import CurvatureError, MismatchError
from gradtrace.fitted.adam import moments_by_layer
from gradtrace.fitted.ekfac import mean_squares
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.vectors import check_coordinates

DAMPING = 1.0  # LDS .61 on a small GPT-2 (512 coordinates a row), where uncompressed gradients with .1 have .51


@dataclass(frozen=True, eq=False)
class Whitening:
    """w = 1 / sqrt(v + damping * mean of v over the layer) of every weight, with the mean square v of its gradient; 0
    in layers where v is zero throughout.

    The inner product of two whitened gradients is <g, H^-1 h>, with a diagonal H: an influence function whose curvature
    is the diagonal of the mean of g gT, damped. Coordinates are the positions in all layers, one after the other.

    by_layer: float32 [size] by layer name, in the order of the model's layers
    """

    by_layer: Mapping[str, Tensor]

    @classmethod
    def of_mean_squares(cls, by_layer: Mapping[str, Tensor], damping: float = DAMPING) -> Whitening:
        """by_layer: v, in any shape."""
        return cls({name: _factors(v.flatten().float(), damping) for name, v in by_layer.items()})

    def check(self, model: GradientModel) -> None:
        """Raises MismatchError where the whitening is of other layers than the model's."""
        expected = {layer.name: layer.size for layer in model.plan.layers}
        if list(expected.items()) != [(name, len(factors)) for name, factors in self.by_layer.items()]:
            raise MismatchError("the whitening is of other layers than the model's: rebuild the index")


def _factors(v: Tensor, damping: float) -> Tensor:
    factors = (v + damping * v.double().mean().float()).rsqrt()
    return torch.where(factors.isfinite(), factors, 0)


def fitted_whitening(model: GradientModel, batches: Iterator[ExampleBatch], damping: float = DAMPING) -> Whitening:
    """From the mean squares of the examples' gradients at their own labels.

    Raises:
        LossError: a loss is NaN or infinite.
        CurvatureError: all gradients are zero.
        UnsupportedLayerError: the model has more weights than 32 bits can number.
    """
    check_coordinates(sum(layer.size for layer in model.plan.layers))
    by_layer = mean_squares(model, batches, {})
    if not any(bool(v.any()) for v in by_layer.values()):
        raise CurvatureError("the gradients of all examples are zero: choose another checkpoint, or other layers")
    unused = {layer.name: torch.zeros(layer.size, device=model.device) for layer in model.plan.layers}
    return Whitening.of_mean_squares({name: by_layer.get(name, zeros) for name, zeros in unused.items()}, damping)


def adam_whitening(model: GradientModel, damping: float = DAMPING) -> Whitening:
    """From Adam's second moments at the model's checkpoint: means over the last steps of squares of batch gradients.
    They are smaller than the mean squares of examples' gradients, by about the size of a batch in each layer alike.

    Raises:
        CheckpointError: the checkpoint has no second moments, or they are of other parameters.
        UnsupportedLayerError: the model has more weights than 32 bits can number.
    """
    check_coordinates(sum(layer.size for layer in model.plan.layers))
    return Whitening.of_mean_squares(moments_by_layer(model), damping)
