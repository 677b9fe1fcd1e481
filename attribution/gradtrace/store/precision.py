"""Quantised rows: float16, int8 or int4 codes with a float32 scale for each row. value = code * scale.

The norms of gradient rows span five orders of magnitude and more, so that float16 alone would round small rows to zero.
The scale brings the largest coordinate of each row near the top of the stored type's range. int4's fifteen steps are
too few for coordinates of different sizes, so each column is first divided by a scale that is the same for all rows of
an index: value = code * scale * column scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Manifest, Precision
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors

STORED_DTYPES: dict[Precision, torch.dtype] = {
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,  # two codes in each, see `pack`
}
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a smaller scale would lose digits
LARGEST_VALUE = 2.0**100  # leaves room for inner products; a gradient of 1e30 means a diverged training anyway
_SMALLEST_COLUMN_SCALE = 2.0**-20  # LARGEST_VALUE divided by it still fits into float32
# For int4, both measured on MNIST at 2,048 and 8,192 dimensions for TracIn and influence functions.
# Power of a column's root mean square by which the column is divided: with 1 the first columns lose precision, with 0
# the last ones.
_COLUMN_POWER = 0.75
# Values are clipped at 4 x the row's root mean square: few are larger, and clipping them costs less than coarser steps
# for all others. As accurate as the best of seven scales tried for each row.
_CLIP = 4.0


def stored_width(width: int, precision: Precision) -> int:
    """Number of elements of the stored type for `width` columns of a row."""
    return -(-width // 2) if precision == "int4" else width


def encode(rows: Tensor, precision: Precision, column_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 rows [n, D] -> stored values [n, stored_width(D)] and float32 scales [n], on the rows' device.

    A row's codes depend only on that row (and, for int4, on column_scales [D]). Zero rows decode to zeros. Scales are
    at least 2^-126; values of rows that would need a smaller one are off by up to half of that.

    Raises:
        StoreError: a coordinate is NaN, infinite, or so large that the row's norm may not fit into float32.
    """
    largest = _largest(rows)
    if not bool((largest <= LARGEST_VALUE).all()):  # NaN compares false
        row = int((~(largest <= LARGEST_VALUE)).nonzero()[0])
        raise StoreError(
            f"row {row} of this batch has a coordinate that is NaN, infinite or above {LARGEST_VALUE:.0e}: the "
            "gradient of that training example has overflowed; check its input, its loss and the checkpoint's weights"
        )
    if precision == "float16":
        _, exponent = torch.frexp(largest)
        # A power of two, so that the division is exact; the largest coordinate becomes 2**14 to 2**15.
        scales = torch.ldexp(torch.ones_like(largest), exponent - 15).clamp_min(_SMALLEST_SCALE)
        return (rows / scales[:, None]).to(torch.float16), scales
    if column_scales is None:
        return _integers(rows, largest, 127)
    column_scales = column_scales.to(rows.device)
    equalized = rows / column_scales
    mean_size = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) / column_scales.norm()
    codes, scales = _integers(equalized, torch.minimum(_largest(equalized), _CLIP * mean_size.float()), 7)
    return pack(codes), scales


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))  # [n]


def _integers(rows: Tensor, largest: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """int8 codes [n, D] from -limit to limit, and scales [n]. `limit` encodes the value `largest` [n]."""
    scales = (largest / limit).clamp_min(_SMALLEST_SCALE)
    return (rows / scales[:, None]).round_().clamp_(-limit, limit).to(torch.int8), scales


def decode(stored: Tensor, scales: Tensor, column_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Stored values [..., stored_width(D)] and scales [...] -> float32 rows [..., D]. Each scale rounds once at most.

    column_scales: [D], or with leading dimensions that broadcast.  out: float32 [..., D], to write to
    """
    values = stored if column_scales is None else unpack(stored, column_scales.shape[-1])
    rows = (values.float() if out is None else out.copy_(values)).mul_(scales[..., None])
    return rows if column_scales is None else rows.mul_(column_scales.to(rows.device))


def pack(codes: Tensor) -> Tensor:
    """int8 codes [n, D] from -7 to 7 -> uint8 [n, ceil(D / 2)].

    A code is stored as code + 8; of two columns, the first is in the lower half of the byte. Odd D is padded with 0.
    """
    nibbles = (F.pad(codes, (0, codes.shape[1] % 2)) + 8).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, width: int) -> Tensor:
    """uint8 [..., ceil(width / 2)] -> int8 codes [..., width]."""
    pairs = packed.to(torch.int16)
    pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)  # one nibble in each of the two bytes
    return pairs.view(torch.int8).sub_(8)[..., :width]


def column_scales(mean_squares: Tensor, rows: int) -> Tensor:
    """(rms / largest rms)^(3/4), with the root mean square rms of each column. float32 [D], in (0, 1].

    mean_squares: [D], over a sample of `rows` rows. One row of equal columns is added to the sample, since a column
    that is zero in the whole sample need not be zero in other rows.
    """
    energy = mean_squares.double()
    smoothed = (energy * rows + energy.mean()) / (rows + 1)
    if not smoothed.any():
        return torch.ones(len(smoothed))
    return (smoothed / smoothed.max()).pow(_COLUMN_POWER / 2).clamp_min(_SMALLEST_COLUMN_SCALE).float()


def load_column_scales(directory: Path, manifest: Manifest) -> list[Tensor]:
    """The column scales of an int4 index, float32 [D] for each training run; an empty list for other precisions.

    Raises:
        CorruptIndexError: the file is missing or damaged.
    """
    shape, files = (manifest.basis.dimensions,), [entry.path for entry in manifest.column_scales]
    tensors = (load_tensors(regular_path(directory, f), "rebuild the index", column_scales=shape) for f in files)
    return [by_name["column_scales"].float() for by_name in tensors]


def tail_norms(rows: Tensor, levels: list[int]) -> Tensor:
    """Norms of each row's tails: the columns from each level on. float32 [n, D] -> float32 [n, len(levels)].

    Entry l is the Euclidean norm of columns levels[l - 1] and up (entry 0: of the whole row), rounded up, so that the
    bound by Cauchy-Schwarz holds.
    """
    return rounded_up(_energies(rows, levels).flip(1).cumsum(1).flip(1).sqrt_())


def norms_by_level(rows: Tensor, levels: Sequence[int]) -> Tensor:
    """Norms of the columns of each level, rounded up. float32 [n, D] -> float32 [n, len(levels)]."""
    return rounded_up(_energies(rows, levels).sqrt_())


def _energies(rows: Tensor, levels: Sequence[int]) -> Tensor:
    """Sum of the squares of each level's columns. float64 [n, len(levels)]."""
    by_level = torch.split(rows, level_widths(levels), dim=1)
    return torch.stack([columns.double().square_().sum(dim=1) for columns in by_level], dim=1)


def norms_of_levels(tails: Tensor) -> Tensor:
    """Norms of each row's columns of each level, from `tail_norms`. float32 [n, levels], rounded up.

    A tail norm is at most two float32 steps too large. So the difference of the squares of two is too large, by what is
    less than 2^-21 of the first.
    """
    tails = tails.double()
    later = F.pad(tails[:, 1:], (0, 1)).mul_(1 - 2.0**-22).sub_(2.0**-148).clamp_min_(0)  # not above the norm
    return rounded_up((tails.square() - later.square_()).clamp_min_(0).sqrt_())


def rounded_up(norms: Tensor) -> Tensor:
    """Norms float64 -> float32, never smaller. Zero stays zero.

    Rounding to nearest loses half a float32 step at most, which one step upwards makes up for; float64 errs less.
    """
    rounded = norms.float()
    return torch.where(norms > 0, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


def level_widths(levels: Sequence[int]) -> list[int]:
    """Number of columns of each level.  levels: column boundaries, ascending"""
    return [stop - start for start, stop in zip([0, *levels[:-1]], levels, strict=True)]
