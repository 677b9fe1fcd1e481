"""The basis of an index: the bases of all layers, which turn a per-example gradient into a row; and reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gradtrace.basis.layer_bases import ChosenCoordinates, DenseProjection, LayerBasis
from gradtrace.errors import MismatchError
from gradtrace.layers import Bases, Layer
from gradtrace.store.manifest import BasisKind, Manifest
from gradtrace.store.tensor_files import load_tensors


@dataclass(frozen=True)
class Basis:
    """Turns a model's per-example gradients into rows of `dimensions` columns, the same at every checkpoint.

    layers: by layer name; gradients of layers that are not named are left out of the rows
    """

    kind: BasisKind
    dimensions: int
    seed: int
    layers: Mapping[str, LayerBasis]

    @cached_property
    def _order(self) -> Tensor:
        """Position of each column of a row in the concatenated coordinates of the layers. int64 [dimensions]."""
        return torch.cat([layer.columns for layer in self.layers.values()]).argsort()

    @property
    def mixes_layers(self) -> bool:
        """Whether every layer is projected to all columns; else each column belongs to one layer."""
        return self.kind in ("gaussian", "rademacher")

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
        if self.mixes_layers:
            return torch.stack(by_layer).sum(0)
        return torch.cat(by_layer, dim=1).index_select(1, self._order)

    def add_use(self, coordinates: dict[str, Tensor], layer: Layer, x: Tensor, d: Tensor) -> None:
        """Add the coordinates of one use of a layer to those of its other uses."""
        if layer.name in self.layers:
            of_use = self.layers[layer.name].of_use(layer, x, d)
            coordinates[layer.name] = coordinates[layer.name] + of_use if layer.name in coordinates else of_use

    def add_whole(self, coordinates: dict[str, Tensor], gradients: Mapping[Layer, Tensor]) -> None:
        """Add the coordinates of whole gradients [batch, groups, out, in], which stray parameters have."""
        for layer, gradient in gradients.items():
            if layer.name in self.layers:
                coordinates[layer.name] = self.layers[layer.name].of_gradient(gradient)

    def to(self, device: torch.device) -> Basis:
        layers = {name: layer.to(device) for name, layer in self.layers.items()}
        return Basis(self.kind, self.dimensions, self.seed, layers)

    def tensors(self) -> dict[str, Tensor]:
        """The content of a basis's file, by "layer name/key". The manifest holds kind, dimensions and seed."""
        return {f"{name}/{key}": value for name, layer in self.layers.items() for key, value in layer.tensors().items()}

    def layer_of_columns(self) -> Tensor:
        """Number of the layer, in alphabetical order, that each column belongs to. int64 [dimensions]."""
        numbers = torch.full((self.dimensions,), -1)
        for number, name in enumerate(sorted(self.layers)):
            numbers[self.layers[name].columns.cpu()] = number
        return numbers


def load_bases(directory: Path, manifest: Manifest) -> list[Basis]:
    """The bases of an index, one for each training run. Raises as `load_basis`."""
    entry = manifest.basis
    return [load_basis(directory / file.path, entry.kind, entry.dimensions, entry.seed) for file in entry.files]


def load_basis(path: Path, kind: BasisKind, dimensions: int, seed: int) -> Basis:
    """Read the tensors of a basis.

    Raises:
        CorruptIndexError: the file is missing or damaged.
    """
    tensors = load_tensors(path, "rebuild the index")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for full_key, value in tensors.items():
        name, _, key = full_key.rpartition("/")
        by_layer.setdefault(name, {})[key] = value
    return Basis(kind, dimensions, seed, {name: _layer_basis(kind, seed, read) for name, read in by_layer.items()})


def _layer_basis(kind: BasisKind, seed: int, tensors: Mapping[str, Tensor]) -> LayerBasis:
    """The inverse of `LayerBasis.tensors`."""
    if "stream" in tensors:
        stream, size = tensors["stream"].tolist()
        entries = "rademacher" if kind == "rademacher" else "gaussian"
        return DenseProjection(entries, seed, stream, size, tensors["columns"])
    bases = Bases(tensors.get("inputs"), tensors.get("outputs"))
    return ChosenCoordinates(bases, tensors["kept"], tensors["columns"])


def require_layers(basis: Basis, layers: Sequence[Layer]) -> None:
    """Raises MismatchError if the basis projects a layer that the model does not have."""
    missing = set(basis.layers) - {layer.name for layer in layers}
    if missing:
        raise MismatchError(
            f"the basis of the index covers layers that the model does not have: {', '.join(sorted(missing))}; open "
            "the index with the model that it was built from"
        )
