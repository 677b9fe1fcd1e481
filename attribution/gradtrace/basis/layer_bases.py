"""Bases of single layers: a layer's per-example gradient to some columns of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.layers import Bases, Layer

_DENSE_BLOCK = 1 << 24  # elements of a dense projection that are drawn at a time
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

    def to(self, device: torch.device) -> ChosenCoordinates:
        sides = (None if side is None else side.to(device) for side in (self.bases.inputs, self.bases.outputs))
        return ChosenCoordinates(Bases(*sides), self.kept.to(device), self.columns.to(device))

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

    def _matrix(self, device: torch.device) -> Iterator[Tensor]:
        """Row blocks of the matrix, each [rows, k]."""
        if self._blocks and self._blocks[0].device == device:
            yield from self._blocks
            return
        kept: list[Tensor] | None = [] if self.size * len(self.columns) <= _DENSE_CACHE else None
        for block in self._draw(device):
            yield block
            if kept is not None:
                kept.append(block)
        self._blocks = kept or []

    def _draw(self, device: torch.device) -> Iterator[Tensor]:
        draw = random_numbers.rademacher if self.kind == "rademacher" else random_numbers.gaussian
        k = len(self.columns)
        step = max(1, _DENSE_BLOCK // k)
        for start in range(0, self.size, step):
            rows = min(step, self.size - start)
            yield draw(self.seed, self.stream, start * k, rows * k, device).view(rows, k) / k**0.5

    def to(self, device: torch.device) -> DenseProjection:
        return DenseProjection(self.kind, self.seed, self.stream, self.size, self.columns.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns.clone(), "stream": torch.tensor([self.stream, self.size])}


LayerBasis = ChosenCoordinates | DenseProjection
