"""The basis: the coordinates of gradients that an index keeps, and how gradients are brought into them.

A layer's basis turns its per-example gradient into some coordinates; an index's basis has those of all layers. They are
the columns of a row, or are rotated into them together. Bases without fitting are made here: the identity, and random
projections. How a basis is fitted to a model is in `fitted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.errors import CorruptIndexError, MismatchError
from gradtrace.layers import IDENTITY, Bases, Layer
from gradtrace.store.manifest import BasisKind, Manifest
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors

_DENSE_BLOCK = 1 << 24  # elements of a dense projection that are drawn at a time
_ROTATION = "rotation"  # key in a basis's file; those of layers have a slash
_DENSE_CACHE = 1 << 27  # elements of a dense projection that are kept instead of drawn again (512 MB)


@dataclass(frozen=True)
class ChosenCoordinates:
    """Chosen coordinates of U_outputs^T G U_inputs (spectral, two-sided random, or no rotation).

    kept: int64 [k], positions in the flattened [groups, s, r]
    columns: int64 [k], of the row that they become
    """

    bases: Bases
    kept: Tensor
    columns: Tensor

    def of_use(self, layer: Layer, x: Tensor, d: Tensor) -> Tensor:
        """From the input and the output gradient of one use: [batch, k]."""
        return layer.coordinates(x, d, self.bases, self.kept)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From whole gradients [batch, groups, out, in]: [batch, k]."""
        return self.bases.rotated(gradient).flatten(1).index_select(1, self.kept)

    def fits(self, layer: Layer) -> bool:
        """Whether the bases have the shape of the layer, and every kept position is one of theirs."""
        shape = [layer.groups]
        for side, size in ((self.bases.outputs, layer.outputs), (self.bases.inputs, layer.inputs)):
            if side is not None and (side.ndim != 3 or tuple(side.shape[:2]) != (layer.groups, size)):
                return False
            shape.append(size if side is None else side.shape[2])
        return len(self.kept) == 0 or 0 <= int(self.kept.min()) <= int(self.kept.max()) < math.prod(shape)

    def to(self, device: torch.device) -> ChosenCoordinates:
        sides = (None if side is None else side.to(device) for side in (self.bases.inputs, self.bases.outputs))
        return ChosenCoordinates(Bases(*sides), self.kept.to(device), self.columns.to(device))

    def positions(self) -> tuple[Tensor, ...]:
        return self.kept, self.columns

    def tensors(self) -> dict[str, Tensor]:
        sides = {"inputs": self.bases.inputs, "outputs": self.bases.outputs}
        present = {key: side.contiguous() for key, side in sides.items() if side is not None}
        return present | {"kept": self.kept, "columns": self.columns}


class DenseProjection:
    """vec(G) R with a random matrix R [size, k] of variance 1/k, so that E[<vec(G) R, vec(H) R>] = <G, H>.

    Paper: Pruthi et al. 2020, Appendix E. The matrix is drawn in blocks, and kept only if it is small.

    kind: of the entries: "rademacher" (signs) or "gaussian"
    columns: int64 [k], of the row that the projection becomes
    """

    def __init__(self, kind: str, seed: int, stream: int, size: int, columns: Tensor) -> None:
        self.kind, self.seed, self.stream, self.size, self.columns = kind, seed, stream, size, columns
        self._blocks: list[Tensor] = []

    def of_use(self, layer: Layer, x: Tensor, d: Tensor) -> Tensor:
        """From the input and the output gradient of one use: [batch, k]."""
        return self.of_gradient(layer.gradient(x, d))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From whole gradients [batch, groups, out, in]: [batch, k]."""
        flat = gradient.flatten(1)  # [batch, size]
        total, start = flat.new_zeros(flat.shape[0], len(self.columns)), 0
        for block in self._matrix(flat.device):
            total += flat[:, start : start + len(block)] @ block
            start += len(block)
        return total

    def fits(self, layer: Layer) -> bool:
        """Whether the matrix has a row for each of the layer's weights."""
        return self.size == layer.size

    def _matrix(self, device: torch.device) -> Iterable[Tensor]:
        """Row blocks of the matrix, each [rows, k]."""
        if self.size * len(self.columns) > _DENSE_CACHE:
            return self._draw(device)
        if not self._blocks or self._blocks[0].device != device:
            self._blocks = list(self._draw(device))
        return self._blocks

    def _draw(self, device: torch.device) -> Iterator[Tensor]:
        draw = random_numbers.rademacher if self.kind == "rademacher" else random_numbers.gaussian
        k = len(self.columns)
        step = max(1, _DENSE_BLOCK // k)
        for start in range(0, self.size, step):
            rows = min(step, self.size - start)
            yield draw(self.seed, self.stream, start * k, rows * k, device).view(rows, k) / k**0.5

    def to(self, device: torch.device) -> DenseProjection:
        return DenseProjection(self.kind, self.seed, self.stream, self.size, self.columns.to(device))

    def positions(self) -> tuple[Tensor, ...]:
        return (self.columns,)

    def tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns.clone(), "stream": torch.tensor([self.stream, self.size])}


LayerBasis = ChosenCoordinates | DenseProjection


@dataclass(frozen=True)
class Basis:
    """Turns a model's per-example gradients into rows of `dimensions` columns, the same at every checkpoint.

    layers: by layer name; gradients of layers that are not named are left out of the rows
    rotation: float32 [coordinates, dimensions] with orthonormal columns, of the layers' coordinates; None: these are
        the columns
    """

    kind: BasisKind
    dimensions: int
    seed: int
    layers: Mapping[str, LayerBasis]
    rotation: Tensor | None = None

    @cached_property
    def _order(self) -> Tensor:
        """Position of each coordinate of a row in the concatenated coordinates of the layers. int64 [coordinates]."""
        return torch.cat([layer.columns for layer in self.layers.values()]).argsort()

    @property
    def coordinates(self) -> int:
        """Number of the layers' coordinates: `dimensions`, or more where these are rotated."""
        return self.dimensions if self.rotation is None else len(self.rotation)

    @property
    def projects_all_layers(self) -> bool:
        """Whether every layer is projected to all columns; else each coordinate belongs to one layer."""
        return self.kind in ("gaussian", "rademacher")

    def is_whole(self) -> bool:
        """Whether each column of a row is that of one coordinate; if all layers are projected to all columns, of one
        coordinate of every layer. Where a rotation follows, whether it has a row for each coordinate."""
        columns = [layer.columns for layer in self.layers.values()]
        numbers = [part for layer in self.layers.values() for part in layer.positions()]
        if not columns or any(part.dtype != torch.int64 or part.ndim != 1 for part in numbers):
            return False
        if any(len(part) != len(layer.columns) for layer in self.layers.values() for part in layer.positions()):
            return False
        by_row = columns if self.projects_all_layers else [torch.cat(columns).sort().values]
        rotation = self.rotation
        if (rotation is not None) != (self.kind == "gauss-newton"):
            return False
        if rotation is not None and (rotation.dtype != torch.float32 or rotation.shape[1:] != (self.dimensions,)):
            return False
        # No range of all columns is made before it is known that the file has as many.
        return all(len(row) == self.coordinates and torch.equal(row, torch.arange(len(row))) for row in by_row)

    def assemble(self, coordinates: Mapping[str, Tensor], batch: int) -> Tensor:
        """Rows, float32 [batch, dimensions], from the coordinates [batch, k] of each layer by its name.

        Layers without coordinates, which the batch did not use, get zeros.
        """
        by_layer = [
            coordinates[name].float()
            if name in coordinates
            else torch.zeros(layer.columns.shape, device=layer.columns.device).expand(batch, -1)
            for name, layer in self.layers.items()
        ]
        if self.projects_all_layers:
            return torch.stack(by_layer).sum(0)
        return self.rotated(torch.cat(by_layer, dim=1).index_select(1, self._order))

    def rotated(self, coordinates: Tensor) -> Tensor:
        """Columns of rows from the layers' coordinates in order. [..., coordinates] -> [..., dimensions]"""
        return coordinates if self.rotation is None else coordinates @ self.rotation

    @cached_property
    def unrotated(self) -> Basis:
        """The same without the rotation."""
        return self if self.rotation is None else replace(self, dimensions=self.coordinates, rotation=None)

    def of_use(self, layer: Layer, x: Any, d: Tensor) -> Tensor | None:
        """The coordinates [batch, k] of one use of a layer; None where rows leave the layer out."""
        return self.layers[layer.name].of_use(layer, x, d) if layer.name in self.layers else None

    def add_use(self, coordinates: dict[str, Tensor], layer: Layer, x: Tensor, d: Tensor) -> None:
        """Add the coordinates of one use of a layer to those of its other uses."""
        of_use = self.of_use(layer, x, d)
        if of_use is not None:
            coordinates[layer.name] = coordinates[layer.name] + of_use if layer.name in coordinates else of_use

    def add_whole(self, coordinates: dict[str, Tensor], gradients: Mapping[Layer, Tensor]) -> None:
        """Add the coordinates of whole gradients [batch, groups, out, in], which stray parameters have."""
        for layer, gradient in gradients.items():
            if layer.name in self.layers:
                coordinates[layer.name] = self.layers[layer.name].of_gradient(gradient)

    def to(self, device: torch.device) -> Basis:
        rotation = None if self.rotation is None else self.rotation.to(device)
        return replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()}, rotation=rotation)

    def tensors(self) -> dict[str, Tensor]:
        """The content of a basis's file, by "layer name/key". The manifest holds kind, dimensions and seed."""
        by_key = {
            f"{name}/{key}": value for name, layer in self.layers.items() for key, value in layer.tensors().items()
        }
        return by_key if self.rotation is None else by_key | {_ROTATION: self.rotation.contiguous()}

    def layer_of_coordinates(self) -> Tensor:
        """Number of the layer, in alphabetical order, that each coordinate belongs to. int64 [coordinates]."""
        numbers = torch.full((self.coordinates,), -1)
        for number, name in enumerate(sorted(self.layers)):
            numbers[self.layers[name].columns.cpu()] = number
        return numbers

    def shares_by_layer(self, vector: Tensor) -> Tensor:
        """The part of each layer, in alphabetical order, in inner products of rows with a vector [dimensions]: rows
        times the returned matrix, float64 [dimensions, layers], whose columns sum to the vector.

        Of rotated rows, the coordinates are taken back by the transposed rotation, which loses what is not stored.
        """
        rotation = None if self.rotation is None else self.rotation.double().cpu()
        weights = vector.double().cpu() if rotation is None else rotation @ vector.double().cpu()  # [coordinates]
        by_layer = torch.zeros(self.coordinates, len(self.layers), dtype=torch.float64)
        by_layer[torch.arange(self.coordinates), self.layer_of_coordinates()] = weights
        return by_layer if rotation is None else rotation.T @ by_layer


def load_bases(directory: Path, manifest: Manifest) -> list[Basis]:
    """The bases of an index, one for each training run. Raises as `load_basis`."""
    entry = manifest.basis
    paths = [regular_path(directory, file.path) for file in entry.files]
    return [load_basis(path, entry.kind, entry.dimensions, entry.seed) for path in paths]


def load_basis(path: Path, kind: BasisKind, dimensions: int, seed: int) -> Basis:
    """Read the tensors of a basis.

    Raises:
        CorruptIndexError: the file is missing or damaged.
    """
    tensors = load_tensors(path, "rebuild the index")
    rotation = tensors.pop(_ROTATION, None)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for full_key, value in tensors.items():
        name, _, key = full_key.rpartition("/")
        by_layer.setdefault(name, {})[key] = value
    layers: dict[str, LayerBasis] = {}
    try:
        for name, of_layer in by_layer.items():  # as `LayerBasis.tensors` gave them
            if "stream" in of_layer:
                stream, size = of_layer["stream"].tolist()
                entries = "rademacher" if kind == "rademacher" else "gaussian"
                layers[name] = DenseProjection(entries, seed, stream, size, of_layer["columns"])
            else:
                bases = Bases(of_layer.get("inputs"), of_layer.get("outputs"))
                layers[name] = ChosenCoordinates(bases, of_layer["kept"], of_layer["columns"])
        basis = Basis(kind, dimensions, seed, layers, rotation)
        whole = basis.is_whole()
    except (KeyError, TypeError, ValueError, RuntimeError):  # tensors are missing, or of another type or shape
        whole = False
    if not whole:
        raise CorruptIndexError(f"{path} is not the basis of {dimensions} columns: restore it or rebuild the index")
    return basis


def check_layers(basis: Basis, layers: Sequence[Layer]) -> None:
    """Raises MismatchError if the basis projects a layer that the model does not have, or has otherwise."""
    missing = set(basis.layers) - {layer.name for layer in layers}
    if missing:
        raise MismatchError(
            f"the basis of the index covers layers that the model does not have: {', '.join(sorted(missing))}; open "
            "the index with the model that it was built from"
        )
    for layer in layers:
        if layer.name in basis.layers and not basis.layers[layer.name].fits(layer):
            raise MismatchError(
                f"the basis of the index does not fit the shape of layer {layer.name}: restore the index's files, or "
                "open it with the model that it was built from"
            )


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
