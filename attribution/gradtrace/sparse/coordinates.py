"""The coordinates of sparse rows: the weights of all attributed layers, one layer after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradtrace.errors import CorruptIndexError, MismatchError
from gradtrace.fitted.curvature import Columns
from gradtrace.layers import Layer
from gradtrace.sparse.vectors import LARGEST_COORDINATE, check_coordinates
from gradtrace.store.manifest import Manifest
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors


@dataclass(frozen=True)
class WeightCoordinates:
    """Which coordinates belong to which layer.

    shapes: groups, outputs and inputs of each layer by its name, in the order of the coordinates
    """

    shapes: Mapping[str, tuple[int, int, int]]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> WeightCoordinates:
        """Raises UnsupportedLayerError where the layers have more weights than 32 bits can number."""
        coordinates = cls({layer.name: (layer.groups, layer.outputs, layer.inputs) for layer in layers})
        check_coordinates(coordinates.count)
        return coordinates

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The coordinates of each layer, by its name."""
        edges = np.cumsum([0, *map(math.prod, self.shapes.values())]).tolist()
        return {name: slice(*pair) for name, pair in zip(self.shapes, pairwise(edges), strict=True)}

    @property
    def count(self) -> int:
        """Number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def alphabetical_numbers(self) -> list[int]:
        """Of each layer, its number in alphabetical order."""
        names = sorted(self.shapes)
        return [names.index(name) for name in self.shapes]

    def of_layers(self, values: Tensor, columns: Columns) -> Tensor:
        """The value of the layer that each of the columns belongs to. values: one for each layer. [n]"""
        edges = torch.tensor([0, *(part.stop for part in self.slices.values())])
        if isinstance(columns, Tensor):
            return values[torch.searchsorted(edges, columns, right=True) - 1]
        start, stop, _ = columns.indices(self.count)
        return values.repeat_interleave(edges.clamp(start, stop).diff())

    def check(self, layers: Sequence[Layer]) -> None:
        """Raises MismatchError unless these are the layers, in this order."""
        if [*self.shapes.items()] != [*WeightCoordinates.of(layers).shapes.items()]:
            raise MismatchError(
                "the rows of the index are of other layers, or of layers of other shapes, than those of the model: "
                "open it with the model, the task and the layers that it was built from"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The content of the file: by layer name the layer's place among the others, groups, outputs and inputs."""
        return {name: torch.tensor([place, *shape]) for place, (name, shape) in enumerate(self.shapes.items())}


def load_coordinates(directory: Path, manifest: Manifest) -> list[WeightCoordinates]:
    """Those of each training run.

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    return [_load(regular_path(directory, file.path)) for file in manifest.basis.files]


def _load(path: Path) -> WeightCoordinates:
    tensors = load_tensors(path, "rebuild the index")
    by_name = {name: tensor.tolist() for name, tensor in tensors.items() if tensor.shape == (4,)}
    whole = len(by_name) == len(tensors) and all(not tensor.is_floating_point() for tensor in tensors.values())
    in_order = sorted(by_name.items(), key=lambda item: item[1][0])
    shapes = {name: (groups, outputs, inputs) for name, (_, groups, outputs, inputs) in in_order}
    whole = whole and [place for _, (place, *_) in in_order] == list(range(len(shapes)))
    count = sum(math.prod(shape) for shape in shapes.values())
    if not whole or min((min(shape) for shape in shapes.values()), default=0) < 1 or count > LARGEST_COORDINATE + 1:
        raise CorruptIndexError(f"{path} does not name the layers of sparse rows: restore it or rebuild the index")
    return WeightCoordinates(shapes)
