"""Rows in fewer bytes: float16 or int8 values with one float32 scale per row. value = stored * scale.

The norms of gradient rows span five orders of magnitude and more, so plain float16 would flush small rows to zero.
The scale puts the largest coordinate of each row near the top of the stored type's range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.manifest import Precision

STORED_DTYPES: dict[Precision, torch.dtype] = {"float16": torch.float16, "int8": torch.int8}
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a scale below it would itself lose digits
LARGEST_VALUE = 2.0**100  # leaves room for inner products; a gradient of 1e30 has left the rails anyway


def encode(rows: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """float32 rows [n, D] -> stored values [n, D] and float32 scales [n], on the rows' device.

    A row's code depends on that row alone. Zero rows come back as zeros. No scale lies below 2^-126: values of rows
    that would need one are off by up to half of that.

    Raises:
        StoreError: a coordinate is NaN, infinite, or too large for its row's norm to be a float32.
    """
    largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))  # [n]
    if not bool((largest <= LARGEST_VALUE).all()):  # NaN compares false
        row = int((~(largest <= LARGEST_VALUE)).nonzero()[0])
        raise StoreError(
            f"row {row} of this batch has a coordinate that is NaN, infinite or above {LARGEST_VALUE:.0e}: the "
            "gradient of that training example has overflowed; check its input, its loss and the checkpoint's weights"
        )
    if precision == "int8":
        scales = (largest / 127).clamp_min(_SMALLEST_SCALE)
        return (rows / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales
    _, exponent = torch.frexp(largest)
    # A power of two, so that dividing by it rounds nothing: the largest coordinate lands in [2**14, 2**15].
    scales = torch.ldexp(torch.ones_like(largest), exponent - 15).clamp_min(_SMALLEST_SCALE)
    return (rows / scales[:, None]).to(torch.float16), scales


def decode(stored: Tensor, scales: Tensor) -> Tensor:
    """Stored values [n, D] and scales [n] -> float32 rows [n, D]: each value rounded at most once."""
    return stored.float().mul_(scales[:, None])


def tail_norms(rows: Tensor, levels: list[int]) -> Tensor:
    """Norms of what is left from each level on. [n, D] float32 -> [n, len(levels)] float32.

    Column l is the Euclidean norm of columns levels[l - 1] and up (column 0: the whole row), rounded up, so that it is
    a true bound in Cauchy-Schwarz.
    """
    energies = [part.double().square_().sum(dim=1) for part in torch.split(rows, _widths(levels), dim=1)]
    energy = torch.stack(energies, dim=1)  # [n, levels]
    tails = energy.flip(1).cumsum(1).flip(1).sqrt_()
    # Rounding to nearest loses half a float32 step at most; a step upwards makes it good. float64 errs less.
    rounded = tails.float()
    return torch.where(tails > 0, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


def _widths(levels: list[int]) -> list[int]:
    return [stop - start for start, stop in zip([0, *levels[:-1]], levels, strict=True)]
