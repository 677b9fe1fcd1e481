"""A use of a layer by a single example, taken apart into its positions.

A layer's gradient is a sum over the positions of its output, and linear in the gradient d there. So each position can
stand as an example of its own, and the gradients of these examples sum to that of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradtrace.layers.base import SLICE_VALUES, Layer
from gradtrace.layers.module import ModuleInputs

_POSITIONS = 64  # that are held at a time: as many as examples of a batch


def position_axis(layer: Layer, x: Any, d: Tensor, count: int) -> int | None:
    """The dimension of a use's output that `count` positions lie along; None if there is no such one, or several."""
    sizes = layer.position_sizes(x, d)
    axes = [axis for axis in range(1, len(sizes)) if sizes[axis] == count]
    return axes[0] if len(axes) == 1 else None


def by_position(layer: Layer, x: Any, d: Tensor, axis: int) -> Iterator[tuple[slice, Any, Tensor]]:
    """Slices of the positions along `axis`, each with (x, d) of as many examples, one for each position.

    x, d: [1, ...], as from `Layer.factors`
    """
    instances = isinstance(x, ModuleInputs) and x.grouped  # [1, instances, ...], each of which is a position
    held = _POSITIONS if layer.pointwise or instances else min(_POSITIONS, max(1, SLICE_VALUES // d.numel()))
    for start in range(0, d.shape[axis], held):
        positions = slice(start, min(start + held, d.shape[axis]))
        if instances:
            yield positions, _instances(x, positions), d[0, positions]
        elif layer.pointwise:
            yield positions, x.movedim(axis, 0)[positions], d.movedim(axis, 0)[positions]
        else:
            yield positions, _repeated(x, positions.stop - start), _masked(d, axis, positions)


def _instances(x: ModuleInputs, positions: slice) -> ModuleInputs:
    count = positions.stop - positions.start
    return replace(x.changed(lambda values: values[0, positions], count), grouped=False)


def _repeated(x: Any, count: int) -> Any:
    """The whole inputs of the example for each of `count` others."""
    if isinstance(x, ModuleInputs):  # [1, ...]: as shared by all examples, the module runs but once
        return replace(x, batched=[False] * len(x.batched), count=count)
    return x.expand(count, *x.shape[1:])


def _masked(d: Tensor, axis: int, positions: slice) -> Tensor:
    """Copies of d [1, ...], each zero but at one of the positions along `axis`. [positions, ...]"""
    numbers = torch.arange(positions.start, positions.stop, device=d.device)
    copies = d.new_zeros(len(numbers), *d.shape[1:])
    copies.movedim(axis, 1)[numbers - positions.start, numbers] = d.movedim(axis, 1)[0, positions]
    return copies
