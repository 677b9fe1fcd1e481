"""One small class for each layer type: how its per-example gradient follows from inputs and output gradients."""

from gradtrace.layers import convolution, embedding, linear, normalization  # noqa: F401  (each registers its types)
from gradtrace.layers.base import IDENTITY, Bases, Layer, Uses, layer_type_of

__all__ = ["IDENTITY", "Bases", "Layer", "Uses", "layer_type_of"]
