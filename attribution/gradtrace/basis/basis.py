"""The basis of an index: what each layer's gradient is projected to, and where the results stand in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.errors import MismatchError
from gradtrace.layers import IDENTITY, Bases, Layer
from gradtrace.store.manifest import BasisKind, Manifest
from gradtrace.store.tensor_files import load_tensors

_DENSE_BLOCK = 1 << 24  # elements of a dense projection that are drawn at a time
_DENSE_CACHE = 1 << 27  # elements of a dense projection that are kept instead of drawn again (512 MB)


class LayerBasis(Protocol):
    """Projects one layer's per-example gradient to some columns of the row."""

    columns: Tensor  # int64 [k]

    def of_use(self, layer: Layer, x: Tensor, d: Tensor) -> Tensor:
        """From one use's input and output gradient: [batch, k]."""

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From the whole gradient in the identity basis, [batch, groups, out, in]: [batch, k]."""


@dataclass(frozen=True)
class ChosenCoordinates:
    """Some coordinates of the gradient after rotating either side (spectral, two-sided random, or no rotation)."""

    bases: Bases
    kept: Tensor  # int64 [k], positions in the flattened [groups, s, r]
    columns: Tensor

    def of_use(self, layer: Layer, x: Tensor, d: Tensor) -> Tensor:
        return layer.coordinates(x, d, self.bases, self.kept)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        return self.bases.rotated(gradient).flatten(1).index_select(1, self.kept)

    def tensors(self) -> dict[str, Tensor]:
        sides = {"inputs": self.bases.inputs, "outputs": self.bases.outputs}
        found = {key: side.contiguous() for key, side in sides.items() if side is not None}
        return found | {"kept": self.kept, "columns": self.columns}


class DenseProjection:
    """Every parameter times a random matrix [size, k], scaled so that inner products are kept in expectation.

    Paper: Pruthi et al. 2020, Appendix E. The matrix is drawn in blocks and kept only if it is small.
    """

    def __init__(self, kind: str, seed: int, stream: int, size: int, columns: Tensor) -> None:
        self.kind, self.seed, self.stream, self.size, self.columns = kind, seed, stream, size, columns
        self._blocks: list[Tensor] = []

    def of_use(self, layer: Layer, x: Tensor, d: Tensor) -> Tensor:
        return self.of_gradient(layer.gradient(x, d))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)  # [batch, size]
        total, start = flat.new_zeros(flat.shape[0], len(self.columns)), 0
        for block in self._matrix(flat.device):
            total += flat[:, start : start + len(block)] @ block
            start += len(block)
        return total

    def _matrix(self, device: torch.device) -> Iterator[Tensor]:
        """Row blocks of the matrix, each [rows, k]."""
        if self._blocks and self._blocks[0].device == device:
            yield from self._blocks
            return
        drawn: list[Tensor] | None = [] if self.size * len(self.columns) <= _DENSE_CACHE else None
        for block in self._draw(device):
            yield block
            if drawn is not None:
                drawn.append(block)
        self._blocks = drawn or []

    def _draw(self, device: torch.device) -> Iterator[Tensor]:
        draw = random_numbers.rademacher if self.kind == "rademacher" else random_numbers.gaussian
        k = len(self.columns)
        step = max(1, _DENSE_BLOCK // k)
        for start in range(0, self.size, step):
            rows = min(step, self.size - start)
            yield draw(self.seed, self.stream, start * k, rows * k, device).view(rows, k) / k**0.5

    def tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns.clone(), "stream": torch.tensor([self.stream, self.size])}


@dataclass(frozen=True)
class Basis:
    """What turns a model's per-example gradients into rows of `dimensions` columns, the same at every checkpoint."""

    kind: BasisKind
    dimensions: int
    seed: int
    layers: Mapping[str, ChosenCoordinates | DenseProjection]  # layer name -> its projection; others are left out

    @cached_property
    def _order(self) -> Tensor:
        """Where each column of a row stands in the layers' parts one after the other. int64 [dimensions]."""
        return torch.cat([layer.columns for layer in self.layers.values()]).argsort()

    @property
    def mixes_layers(self) -> bool:
        """Whether every layer is projected to all columns; else each column belongs to one layer."""
        return self.kind in ("gaussian", "rademacher")

    def assemble(self, parts: Mapping[str, Tensor], batch: int) -> Tensor:
        """Rows [batch, dimensions] from the parts [batch, k] of the layers; a layer without a part was not used."""
        found = [
            parts[name].float()
            if name in parts
            else torch.zeros(layer.columns.shape, device=layer.columns.device).expand(batch, -1)
            for name, layer in self.layers.items()
        ]
        if self.mixes_layers:
            return torch.stack(found).sum(0)
        return torch.cat(found, dim=1).index_select(1, self._order)

    def add_use(self, parts: dict[str, Tensor], layer: Layer, x: Tensor, d: Tensor) -> None:
        """Add one use's coordinates to the layer's part."""
        if layer.name in self.layers:
            part = self.layers[layer.name].of_use(layer, x, d)
            parts[layer.name] = parts[layer.name] + part if layer.name in parts else part

    def add_whole(self, parts: dict[str, Tensor], gradients: Mapping[Layer, Tensor]) -> None:
        """Add the coordinates of whole gradients, each [batch, groups, out, in], such as stray parameters have."""
        for layer, gradient in gradients.items():
            if layer.name in self.layers:
                parts[layer.name] = self.layers[layer.name].of_gradient(gradient)

    def to(self, device: torch.device) -> Basis:
        layers: dict[str, ChosenCoordinates | DenseProjection] = {}
        for name, layer in self.layers.items():
            if isinstance(layer, DenseProjection):
                layers[name] = DenseProjection(
                    layer.kind, layer.seed, layer.stream, layer.size, layer.columns.to(device)
                )
            else:
                sides = (
                    None if side is None else side.to(device) for side in (layer.bases.inputs, layer.bases.outputs)
                )
                layers[name] = ChosenCoordinates(Bases(*sides), layer.kept.to(device), layer.columns.to(device))
        return Basis(self.kind, self.dimensions, self.seed, layers)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but kind, dimensions and seed (the manifest has these), by `layer name/part`."""
        return {f"{name}/{key}": value for name, layer in self.layers.items() for key, value in layer.tensors().items()}

    def layer_of_columns(self) -> Tensor:
        """Number, in alphabetical order, of the layer that each column belongs to. int64 [dimensions]."""
        owner = torch.full((self.dimensions,), -1)
        for number, name in enumerate(sorted(self.layers)):
            owner[self.layers[name].columns.cpu()] = number
        return owner


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
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = value
    layers: dict[str, ChosenCoordinates | DenseProjection] = {}
    for name, found in parts.items():
        if "stream" in found:
            stream, size = found["stream"].tolist()
            layers[name] = DenseProjection(
                "rademacher" if kind == "rademacher" else "gaussian", seed, stream, size, found["columns"]
            )
        else:
            layers[name] = ChosenCoordinates(
                Bases(found.get("inputs"), found.get("outputs")), found["kept"], found["columns"]
            )
    return Basis(kind, dimensions, seed, layers)


def require_layers(basis: Basis, layers: Sequence[Layer]) -> None:
    """Raises MismatchError if the basis projects a layer that the model does not have."""
    missing = set(basis.layers) - {layer.name for layer in layers}
    if missing:
        raise MismatchError(
            f"the basis of the index covers layers that the model does not have: {', '.join(sorted(missing))}"
        )


def identity_basis(layers: Sequence[Layer], seed: int) -> Basis:
    """No compression: every parameter of every layer, in order ("none")."""
    chosen: dict[str, ChosenCoordinates | DenseProjection] = {}
    start = 0
    for layer in layers:
        chosen[layer.name] = ChosenCoordinates(
            IDENTITY, torch.arange(layer.size), torch.arange(start, start + layer.size)
        )
        start += layer.size
    return Basis("none", start, seed, chosen)


def dense_basis(layers: Sequence[Layer], kind: BasisKind, dimensions: int, seed: int) -> Basis:
    """One dense random projection of all parameters together (Pruthi et al. 2020, Appendix E)."""
    columns = torch.arange(dimensions)
    return Basis(
        kind,
        dimensions,
        seed,
        {layer.name: DenseProjection(kind, seed, number, layer.size, columns) for number, layer in enumerate(layers)},
    )


def two_sided_basis(layers: Sequence[Layer], dimensions: int, seed: int) -> Basis:
    """Random projections of either side of each layer's gradient (Pruthi et al. 2020, Appendix F).

    Every layer gets an equal share of the dimensions, or all its coordinates where they are fewer; norms and
    stray parameters, which have one side only, get a dense projection. `dimensions` is rounded down to fit.
    """
    chosen: dict[str, ChosenCoordinates | DenseProjection] = {}
    start = 0
    for number, layer in enumerate(sorted(layers, key=lambda layer: layer.size)):
        share = (dimensions - start) // (len(layers) - number)
        layer_basis = _two_sided_layer(layer, share, start, seed, number)
        chosen[layer.name] = layer_basis
        start += len(layer_basis.columns)
    return Basis("two-sided", start, seed, chosen)


def _two_sided_layer(
    layer: Layer, share: int, start: int, seed: int, number: int
) -> ChosenCoordinates | DenseProjection:
    if layer.size <= share:
        return ChosenCoordinates(IDENTITY, torch.arange(layer.size), torch.arange(start, start + layer.size))
    if not layer.rotates or layer.groups > 1:
        return DenseProjection("gaussian", seed, 2 * number, layer.size, torch.arange(start, start + share))
    s = min(layer.outputs, max(1, int(share**0.5)))
    r = min(layer.inputs, max(1, share // s))
    s = min(layer.outputs, max(1, share // r))
    inputs = random_numbers.gaussian(seed, 2 * number, 0, layer.inputs * r).view(1, layer.inputs, r) / r**0.5
    outputs = random_numbers.gaussian(seed, 2 * number + 1, 0, layer.outputs * s).view(1, layer.outputs, s) / s**0.5
    return ChosenCoordinates(Bases(inputs, outputs), torch.arange(s * r), torch.arange(start, start + s * r))
