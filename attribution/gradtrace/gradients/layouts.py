"""Uses of layers, and their layouts: which example each position of a layer's output belongs to.

Most layers see a batch with its examples in the first dimension. Others see time first, examples folded into
positions, only the tokens that a router sent to them, or sequences packed without padding. Autograd tells which example
a position belongs to: with each example's loss multiplied by a different number (its "color"), the gradient at a
position is multiplied by the color of its example. A position whose gradient is not multiplied by any one color belongs
to several examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradtrace.errors import SharedPositionsError, UnsupportedLayerError
from gradtrace.layers import CallInputs, Layer, ModuleInputs

_SPREAD = 20  # binary orders of magnitude between the smallest and the largest color
# Relative to the largest gradient at any position:
_NEGLIGIBLE = 1e-6  # a gradient too small for its owner to matter
_ROUNDING = 2e-6


class Layout(Enum):
    """Where the examples are in a layer's inputs and outputs."""

    FIRST = "examples first"  # [batch, ...]
    SECOND = "examples second"  # [time, batch, ...]
    FOLDED = "positions folded into the batch"  # [batch * positions, ...]
    INTERLEAVED = "batch folded into the positions"  # [positions * batch, ...]
    SCATTERED = "any order"  # determined by colors in each batch
    SHARED = "the same for all examples"  # [...] without a batch: each example is given a copy
    SHARED_FIRST = "the same for all examples, in a batch of one"  # [1, ...]


SHARED_LAYOUTS = (Layout.SHARED, Layout.SHARED_FIRST)
_FIXED = (Layout.FIRST, Layout.SECOND, Layout.FOLDED, Layout.INTERLEAVED)


def fits(layout: Layout, shape: Sequence[int], batch: int, uniform: bool = True) -> bool:
    """Whether an output with leading dimensions `shape` can have this layout, for a batch of `batch` examples.

    uniform: the examples are of one size. Folded examples of different sizes may be ragged.
    """
    if layout is Layout.FIRST:
        return len(shape) > 0 and shape[0] == batch
    if layout is Layout.SECOND:
        return len(shape) > 1 and shape[1] == batch
    if layout in (Layout.FOLDED, Layout.INTERLEAVED):
        return uniform and len(shape) > 0 and shape[0] % batch == 0
    return False


def examples_first(values: Tensor, layout: Layout, batch: int) -> Tensor:
    """Values in one of the fixed layouts, rearranged to [batch, ...]."""
    if layout is Layout.SECOND:
        return values.transpose(0, 1)
    if layout is Layout.FOLDED:
        return values.reshape(batch, -1, *values.shape[1:])
    if layout is Layout.INTERLEAVED:
        return values.reshape(-1, batch, *values.shape[1:]).transpose(0, 1)
    return values


def colors(batch: int, device: torch.device) -> Tensor:
    """A factor for each example: a geometric sequence around 1. float32 [batch]"""
    return torch.linspace(-_SPREAD / 2, _SPREAD / 2, batch, device=device).exp2()


@dataclass(frozen=True)
class Owners:
    """The example that each position in a batch belongs to.

    example: int64 [positions], the example whose color is nearest
    certain: bool [positions], False where the gradient is too small to tell (and to matter)
    mixed: bool [positions], True where the gradient comes from several examples
    nonzero: bool [positions], whether there is a gradient
    """

    example: Tensor
    certain: Tensor
    mixed: Tensor
    nonzero: Tensor


def owners(gradients: Tensor, colored: Tensor, batch: int) -> Owners:
    """The owners of positions, from their gradients without and with colors, in a batch of at least two examples.

    gradients, colored: [positions, ...]

    A position of an example with color c has colored = c gradient; c is estimated by least squares.

    Raises:
        UnsupportedLayerError: the gradients' type is too coarse to tell so many colors apart.
    """
    flat = (values.flatten(1) if values.dim() > 1 else values[:, None] for values in (gradients, colored))
    without, with_colors = (values.double() for values in flat)  # [positions, n]
    squares = without.square().sum(1)
    ratio = (without * with_colors).sum(1) / squares.clamp_min(torch.finfo(torch.float64).tiny)
    steps = (ratio.clamp_min(2.0**-_SPREAD).log2() / _SPREAD + 0.5) * (batch - 1)  # the inverse of `colors`
    example = steps.round().long().clamp(0, batch - 1)
    color = colors(batch, gradients.device).double()[example]
    tolerance = max(1e-3, 4 * torch.finfo(gradients.dtype).eps)
    if 2 ** (_SPREAD / (batch - 1)) < 1 + 2 * tolerance:
        raise UnsupportedLayerError(
            f"{batch} examples of a batch cannot be told apart in {gradients.dtype}, in a layer that sees them in "
            "another order than the batch: choose a smaller batch_size"
        )
    norms, largest = squares.sqrt(), squares.max().sqrt()
    # A gradient may be a small difference of large terms (a router's softmax); no color multiplies their rounding.
    rounding = max(_ROUNDING, 4 * torch.finfo(gradients.dtype).eps) * largest
    is_mixed = (with_colors - color[:, None] * without).norm(dim=1) > color * (tolerance * norms + rounding)
    certain = norms > _NEGLIGIBLE * largest
    return Owners(example, certain, is_mixed & certain, squares > 0)


def fitting_layouts(position_owners: Owners, shape: Sequence[int], batch: int) -> list[Layout]:
    """The fixed layouts of leading dimensions `shape` that give every certain position to its owner, simplest first."""
    fitting = []
    example = position_owners.example
    for layout in _FIXED:
        if not fits(layout, shape, batch):
            continue
        numbers = torch.arange(example.numel(), device=example.device).view(*shape)
        by_example = examples_first(numbers, layout, batch).reshape(batch, -1)  # position numbers of each example
        expected = torch.empty_like(example)
        owner = torch.arange(batch, device=expected.device).repeat_interleave(by_example.shape[1])
        expected[by_example.flatten()] = owner
        if bool((expected == example)[position_owners.certain].all()):
            fitting.append(layout)
    return fitting


def gathering(position_owners: Owners, batch: int) -> Callable[[Tensor], Tensor]:
    """A function that gathers scattered positions by example: [positions, ...] -> [batch, most of an example, ...].

    An example with fewer positions is padded with zeros. Positions without gradient are left out.
    """
    positions = position_owners.nonzero.nonzero().flatten()
    order = position_owners.example[positions].argsort(stable=True)
    positions = positions[order]
    example = position_owners.example[positions]
    counts = torch.bincount(example, minlength=batch)
    slot = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[example]
    slots = max(1, int(counts.max()))

    def gather(values: Tensor) -> Tensor:
        gathered = values.new_zeros(batch, slots, *values.shape[1:])
        gathered[example, slot] = values[positions]
        return gathered

    return gather


Inputs = Tensor | CallInputs | ModuleInputs


@dataclass(eq=False, slots=True)
class Use:
    """One use of a layer in a forward pass.

    leading: the dimensions of the output before those of a single instance
    fits: the output's dimensions are those of `layout`
    repeated: the layer has other uses in the same forward pass
    gradient, colored: at the output, from the losses and from the losses times colors (see `layouts`); None until the
        backward pass reaches the output
    """

    layer: Layer
    inputs: Inputs
    layout: Layout
    leading: tuple[int, ...]
    fits: bool
    repeated: bool = False
    gradient: Tensor | None = None
    colored: Tensor | None = None

    def owners(self, batch: int) -> Owners:
        """The example that each position belongs to, in a batch of at least two examples."""
        assert self.gradient is not None
        assert self.colored is not None
        return owners(self._flat(self.gradient), self._flat(self.colored), batch)

    def examples_first(self, batch: int) -> tuple[Any, Tensor]:
        """The two sides of the layer's gradient, as from `Layer.factors`. Both [batch, ...].

        Raises:
            UnsupportedLayerError: the examples are not in the first dimension, and the layer needs them there.
            SharedPositionsError: a position belongs to several examples.
        """
        assert self.gradient is not None
        inputs, d = self.inputs, self.gradient
        if (self.layout is Layout.FIRST and self.fits) or (batch == 1 and self.leading[:1] == (1,)):
            return self.layer.factors(inputs, d)
        if not self.layer.takes_instances:
            raise UnsupportedLayerError(
                f"layer {self.layer.name} is given inputs {list(self.gradient.shape)} in a batch of {batch}, whose "
                "examples are not in the first dimension, as they were in the sample of rows that the model was "
                "examined on: freeze it, or let it see whole batches"
            )
        reorder = self._reordering(batch)
        inputs = changed_inputs(inputs, reorder, batch)
        inputs = replace(inputs, grouped=True) if isinstance(inputs, ModuleInputs) else inputs
        return self.layer.factors(inputs, reorder(d))

    def _reordering(self, batch: int) -> Callable[[Tensor], Tensor]:
        """From values in the layer's layout to [batch, instances, ...]."""
        if batch == 1:
            return partial(torch.unsqueeze, dim=0)
        if self.fits:
            return partial(examples_first, layout=self.layout, batch=batch)
        position_owners = self.owners(batch)
        if bool(position_owners.mixed.any()):
            raise SharedPositionsError(
                f"examples of a batch share positions of layer {self.layer.name} (equal ones computed once?), "
                "which the sample of rows did not show: choose batch_size=1"
            )
        gather = gathering(position_owners, batch)
        return lambda values: gather(self._flat(values))

    def _flat(self, values: Tensor) -> Tensor:
        """The leading dimensions flattened into one: [positions, ...]."""
        return values.reshape(-1, *values.shape[len(self.leading) :])


def changed_inputs(inputs: Inputs, change: Callable[[Tensor], Tensor], batch: int) -> Inputs:
    """Inputs whose tensors of the batch are replaced by `change` of them, which have `batch` entries."""
    return change(inputs) if isinstance(inputs, Tensor) else inputs.changed(change, batch)
