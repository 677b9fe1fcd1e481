"""Which example each position of a layer's output belongs to.

Most layers see a batch with its examples in the first dimension. Others see time first, examples folded into
positions, only the tokens that a router sent to them, or sequences packed without padding. Autograd itself tells whose
a position is: with each loss times a number of its own (a "color"), the gradient at a position is multiplied by the
color of its example. A position whose gradient is no multiple belongs to several examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from gradtrace.errors import UnsupportedLayerError

_SPREAD = 20  # binary orders of magnitude between the smallest and the largest color
_NEGLIGIBLE = 1e-6  # of the largest gradient at any position: nothing depends on whose it is
_ROUNDING = 2e-6  # of the largest gradient at any position


class Layout(Enum):
    """Where the examples are in a layer's inputs and outputs."""

    FIRST = "examples first"  # [batch, ...]
    SECOND = "examples second"  # [time, batch, ...]
    FOLDED = "positions folded into the batch"  # [batch * positions, ...]
    INTERLEAVED = "batch folded into the positions"  # [positions * batch, ...]
    SCATTERED = "any order"  # found by colors in each batch
    SHARED = "the same for all examples"  # [...] without a batch: each example is given a copy
    SHARED_FIRST = "the same for all examples, in a batch of one"  # [1, ...]


SHARED_LAYOUTS = (Layout.SHARED, Layout.SHARED_FIRST)
_FIXED = (Layout.FIRST, Layout.SECOND, Layout.FOLDED, Layout.INTERLEAVED)


def fits(layout: Layout, shape: Sequence[int], batch: int) -> bool:
    """Whether leading dimensions `shape` can have a layout."""
    if layout is Layout.FIRST:
        return len(shape) > 0 and shape[0] == batch
    if layout is Layout.SECOND:
        return len(shape) > 1 and shape[1] == batch
    if layout in (Layout.FOLDED, Layout.INTERLEAVED):
        return len(shape) > 0 and shape[0] % batch == 0
    return False


def examples_first(values: Tensor, layout: Layout, batch: int) -> Tensor:
    """[batch, ...] from values whose leading dimensions have one of the fixed layouts."""
    if layout is Layout.SECOND:
        return values.transpose(0, 1)
    if layout is Layout.FOLDED:
        return values.reshape(batch, -1, *values.shape[1:])
    if layout is Layout.INTERLEAVED:
        return values.reshape(-1, batch, *values.shape[1:]).transpose(0, 1)
    return values


def colors(batch: int, device: torch.device) -> Tensor:
    """One factor for each example, at constant ratios, around one. float32 [batch]"""
    return torch.linspace(-_SPREAD / 2, _SPREAD / 2, batch, device=device).exp2()


@dataclass(frozen=True)
class Owners:
    """Whose each position of a batch is.

    example: int64 [positions], the nearest example.
    certain: bool [positions], False where the gradient is too small to tell: nothing depends on it then.
    mixed: bool [positions], True where several examples have a part in the gradient.
    nonzero: bool [positions]
    """

    example: Tensor
    certain: Tensor
    mixed: Tensor
    nonzero: Tensor


def owners(gradients: Tensor, colored: Tensor, batch: int) -> Owners:
    """From the gradients [positions, ...] without and with colors, of a batch of at least two examples."""
    flat = (values.flatten(1) if values.dim() > 1 else values[:, None] for values in (gradients, colored))
    plain, tinted = (values.double() for values in flat)  # [positions, n]
    squares = plain.square().sum(1)
    ratio = (plain * tinted).sum(1) / squares.clamp_min(torch.finfo(torch.float64).tiny)
    places = (ratio.clamp_min(2.0**-_SPREAD).log2() / _SPREAD + 0.5) * (batch - 1)
    example = places.round().long().clamp(0, batch - 1)
    color = colors(batch, gradients.device).double()[example]
    tolerance = max(1e-3, 4 * torch.finfo(gradients.dtype).eps)
    if 2 ** (_SPREAD / (batch - 1)) < 1 + 2 * tolerance:
        raise UnsupportedLayerError(
            f"{batch} examples of a batch cannot be told apart in {gradients.dtype}, in a layer that sees them in "
            "another order than the batch: choose a smaller batch_size"
        )
    norms, largest = squares.sqrt(), squares.max().sqrt()
    # A gradient may be a small difference of large terms (a router's softmax), whose rounding no color multiplies.
    rounding = max(_ROUNDING, 4 * torch.finfo(gradients.dtype).eps) * largest
    apart = (tinted - color[:, None] * plain).norm(dim=1) > color * (tolerance * norms + rounding)
    certain = norms > _NEGLIGIBLE * largest
    return Owners(example, certain, apart & certain, squares > 0)


def fitting_layouts(found: Owners, shape: Sequence[int], batch: int) -> set[Layout]:
    """The fixed layouts that give every certain position of leading dimensions `shape` to its example."""
    fitting = set()
    for layout in _FIXED:
        if not fits(layout, shape, batch):
            continue
        numbers = torch.arange(found.example.numel(), device=found.example.device).view(*shape)
        by_example = examples_first(numbers, layout, batch).reshape(batch, -1)  # position numbers of each example
        expected = torch.empty_like(found.example)
        expected[by_example.flatten()] = torch.arange(batch, device=expected.device).repeat_interleave(
            by_example.shape[1]
        )
        if bool((expected == found.example)[found.certain].all()):
            fitting.add(layout)
    return fitting


def preferred(layouts: set[Layout]) -> Layout:
    """The simplest of those that fit everything that was seen; SCATTERED where none does."""
    return next((layout for layout in _FIXED if layout in layouts), Layout.SCATTERED)


class Grouping:
    """Gathers scattered positions by example: [positions, ...] -> [batch, most positions of an example, ...], with
    zeros where an example has fewer. Positions without gradient are left out."""

    def __init__(self, found: Owners, batch: int) -> None:
        self._batch = batch
        self._chosen = found.nonzero.nonzero().flatten()
        example = found.example[self._chosen]
        order = example.argsort(stable=True)
        self._chosen, self._example = self._chosen[order], example[order]
        counts = torch.bincount(self._example, minlength=batch)
        starts = counts.cumsum(0) - counts
        self._slot = torch.arange(len(order), device=order.device) - starts[self._example]
        self._most = max(1, int(counts.max()))

    def __call__(self, values: Tensor) -> Tensor:
        gathered = values.new_zeros(self._batch, self._most, *values.shape[1:])
        gathered[self._example, self._slot] = values[self._chosen]
        return gathered
