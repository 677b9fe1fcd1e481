"""One small class for each layer type: its per-example gradient as a function of its inputs and output gradients."""

from gradtrace.layers import convolution, embedding, linear, normalization  # noqa: F401  (each registers its types)
from gradtrace.layers.base import IDENTITY, Bases, Layer, Uses, layer_type_of, real_values
from gradtrace.layers.by_position import by_position, position_axis
from gradtrace.layers.module import ModuleInputs, ModuleLayer
from gradtrace.layers.parameters import CallInputs, ParameterLayer, parameter_layer

__all__ = [
    "IDENTITY",
    "Bases",
    "CallInputs",
    "Layer",
    "ModuleInputs",
    "ModuleLayer",
    "ParameterLayer",
    "Uses",
    "by_position",
    "layer_type_of",
    "parameter_layer",
    "position_axis",
    "real_values",
]
