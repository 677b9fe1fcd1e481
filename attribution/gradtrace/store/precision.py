"""Rows in fewer bytes: float16, int8 or int4 codes with one float32 scale per row. value = code * scale.

The norms of gradient rows span five orders of magnitude and more, so plain float16 would flush small rows to zero.
The scale puts the largest coordinate of each row near the top of the stored type's range. Fifteen steps are too few
for coordinates of different sizes, so int4 first divides each column by a scale of its own, the same for all rows of an
index: value = code * scale * column scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Manifest, Precision
from gradtrace.store.tensor_files import load_tensors

STORED_DTYPES: dict[Precision, torch.dtype] = {
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,  # two codes each, see `pack`
}
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a scale below it would itself lose digits
LARGEST_VALUE = 2.0**100  # leaves room for inner products; a gradient of 1e30 has left the rails anyway
_SMALLEST_COLUMN_SCALE = 2.0**-20  # dividing LARGEST_VALUE by it still leaves room in float32
# int4, measured on MNIST at 2,048 and 8,192 dimensions for TracIn and influence functions: dividing each column by all
# of its root mean square takes too much from the first columns, not dividing too much from the last. Few coordinates
# stand out of a row, and clipping them (at four times what an even row would have) costs less than coarser steps for
# all the others; it comes as near as the best of seven scales tried on each row.
_COLUMN_POWER = 0.75
_CLIP = 4.0


def stored_width(width: int, precision: Precision) -> int:
    """Elements of the stored type that a row of so many columns takes."""
    return -(-width // 2) if precision == "int4" else width


def encode(rows: Tensor, precision: Precision, column_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 rows [n, D] -> stored values [n, stored_width(D)] and float32 scales [n], on the rows' device.

    A row's code depends on that row alone (and, for int4, on column_scales [D]). Zero rows come back as zeros. No scale
    lies below 2^-126: values of rows that would need one are off by up to half of that.

    Raises:
        StoreError: a coordinate is NaN, infinite, or too large for its row's norm to be a float32.
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
        # A power of two, so that dividing by it rounds nothing: the largest coordinate lands in [2**14, 2**15].
        scales = torch.ldexp(torch.ones_like(largest), exponent - 15).clamp_min(_SMALLEST_SCALE)
        return (rows / scales[:, None]).to(torch.float16), scales
    if column_scales is None:
        return _integers(rows, largest, 127)
    column_scales = column_scales.to(rows.device)
    even = rows / column_scales  # what the columns' scales leave of the differences between them
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) / column_scales.norm()
    codes, scales = _integers(even, torch.minimum(_largest(even), _CLIP * norms.float()), 7)
    return pack(codes), scales


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))  # [n]


def _integers(rows: Tensor, largest: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes up to `limit`, which stands for `largest`, and scales."""
    scales = (largest / limit).clamp_min(_SMALLEST_SCALE)
    return (rows / scales[:, None]).round_().clamp_(-limit, limit).to(torch.int8), scales


def decode(stored: Tensor, scales: Tensor, column_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Stored values and scales [n] -> float32 rows [n, D]; each scale rounds a value once at most.

    More leading dimensions than one are welcome, also of column scales.  out: float32 [n, D] to write to.
    """
    values = stored if column_scales is None else unpack(stored, column_scales.shape[-1])
    rows = (values.float() if out is None else out.copy_(values)).mul_(scales[..., None])
    return rows if column_scales is None else rows.mul_(column_scales.to(rows.device))


def pack(codes: Tensor) -> Tensor:
    """int8 codes [n, D] from -7 to 7 -> uint8 [n, ceil(D / 2)].

    Each is stored as code + 8, the earlier column of two in the lower half of the byte. A missing last one is zero.
    """
    nibbles = (F.pad(codes, (0, codes.shape[1] % 2)) + 8).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, width: int) -> Tensor:
    """uint8 [..., ceil(width / 2)] -> int8 codes [..., width]."""
    pairs = packed.to(torch.int16)
    pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)  # one nibble in each of the two bytes
    return pairs.view(torch.int8).sub_(8)[..., :width]


def column_scales(mean_squares: Tensor, rows: int) -> Tensor:
    """Root mean square of each column to the power of 3/4, as a share of the largest one. float32 [D], in (0, 1].

    mean_squares: [D], over a sample of so many rows. One more row, equal in all columns, is counted with them: a column
    that was zero in the whole sample may not be so in other rows.
    """
    energy = mean_squares.double()
    smoothed = (energy * rows + energy.mean()) / (rows + 1)
    if not smoothed.any():
        return torch.ones(len(smoothed))
    return (smoothed / smoothed.max()).pow(_COLUMN_POWER / 2).clamp_min(_SMALLEST_COLUMN_SCALE).float()


def load_column_scales(directory: Path, manifest: Manifest) -> list[Tensor]:
    """What the index at `directory` divides its columns by, float32 [D] for each training run; none where it does not.

    Raises:
        CorruptIndexError: the file is missing or damaged.
    """
    files = [directory / entry.path for entry in manifest.column_scales]
    return [load_tensors(file, "rebuild the index", "column_scales")["column_scales"] for file in files]


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
