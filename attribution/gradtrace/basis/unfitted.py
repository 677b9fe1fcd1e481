"""Bases that need no fitting to a model's gradients: the identity, and random projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradtrace import random_numbers
from gradtrace.basis.basis import Basis, ChosenCoordinates, DenseProjection, LayerBasis
from gradtrace.layers import IDENTITY, Bases, Layer
from gradtrace.store.manifest import BasisKind


def identity_basis(layers: Sequence[Layer], seed: int) -> Basis:
    """No compression: every parameter of every layer, in order ("none")."""
    layer_bases: dict[str, LayerBasis] = {}
    start = 0
    for layer in layers:
        layer_bases[layer.name] = _all_coordinates(layer, start)
        start += layer.size
    return Basis("none", start, seed, layer_bases)


def _all_coordinates(layer: Layer, start: int) -> ChosenCoordinates:
    """start: the first of the columns that they become"""
    return ChosenCoordinates(IDENTITY, torch.arange(layer.size), torch.arange(start, start + layer.size))


def dense_basis(layers: Sequence[Layer], kind: BasisKind, dimensions: int, seed: int) -> Basis:
    """One dense random projection of all parameters together (Pruthi et al. 2020, Appendix E)."""
    columns = torch.arange(dimensions)
    layer_bases: dict[str, LayerBasis] = {
        layer.name: DenseProjection(kind, seed, number, layer.size, columns) for number, layer in enumerate(layers)
    }
    return Basis(kind, dimensions, seed, layer_bases)


def two_sided_basis(layers: Sequence[Layer], dimensions: int, seed: int) -> Basis:
    """Random projections of both sides of each layer's gradient (Pruthi et al. 2020, Appendix F).

    vec(U_outputs^T G U_inputs), with Gaussian U_inputs [in, r] of variance 1/r and U_outputs [out, s] of variance 1/s,
    preserves inner products of gradients in expectation. Every layer gets an equal share of the dimensions, or all its
    coordinates if these are fewer. Norms and stray parameters, which have one side only, and grouped convolutions get a
    dense projection. `dimensions` is rounded down to what the layers' r s sum to.
    """
    layer_bases: dict[str, LayerBasis] = {}
    start = 0
    for number, layer in enumerate(sorted(layers, key=lambda layer: layer.size)):
        share = (dimensions - start) // (len(layers) - number)
        layer_basis = _two_sided_layer(layer, share, start, seed, number)
        layer_bases[layer.name] = layer_basis
        start += len(layer_basis.columns)
    return Basis("two-sided", start, seed, layer_bases)


def _two_sided_layer(layer: Layer, share: int, start: int, seed: int, number: int) -> LayerBasis:
    """share: dimensions at most.  start: the first column.  number: of the layer, for the streams of random numbers"""
    if layer.size <= share:
        return _all_coordinates(layer, start)
    if not layer.rotates or layer.groups > 1:
        return DenseProjection("gaussian", seed, 2 * number, layer.size, torch.arange(start, start + share))
    s = min(layer.outputs, max(1, int(share**0.5)))
    r = min(layer.inputs, max(1, share // s))
    s = min(layer.outputs, max(1, share // r))
    inputs = random_numbers.gaussian(seed, 2 * number, 0, layer.inputs * r).view(1, layer.inputs, r) / r**0.5
    outputs = random_numbers.gaussian(seed, 2 * number + 1, 0, layer.outputs * s).view(1, layer.outputs, s) / s**0.5
    return ChosenCoordinates(Bases(inputs, outputs), torch.arange(s * r), torch.arange(start, start + s * r))
