"""The basis: the coordinates of gradients that an index keeps, and how gradients are brought into them.

How a basis is fitted to a model is in `fitted`."""

from gradtrace.basis.basis import (
    Basis,
    ChosenCoordinates,
    DenseProjection,
    LayerBasis,
    load_bases,
    load_basis,
    require_layers,
)
from gradtrace.basis.unfitted import dense_basis, identity_basis, two_sided_basis

__all__ = [
    "Basis",
    "ChosenCoordinates",
    "DenseProjection",
    "LayerBasis",
    "dense_basis",
    "identity_basis",
    "load_bases",
    "load_basis",
    "require_layers",
    "two_sided_basis",
]
