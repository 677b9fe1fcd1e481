"""Counter-based random numbers: pure functions of (seed, stream, position), which may be computed in any order.

Integers and signs are identical on every device. Normal values agree to 1e-6, as far as logarithms and cosines do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014): the increment, and (shift, multiplier) twice, as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's >> on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for bits, multiplier in _MULTIPLIERS:
        x = (x ^ _shift_right(x, bits)) * multiplier
    return x ^ _shift_right(x, 31)


def random_integers(seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` 64-bit integers at positions [start, start + count) of a stream. int64 [count]."""
    return integers_at(seed, stream, torch.arange(start, start + count, device=device))


def integers_at(seed: int, stream: int, positions: Tensor) -> Tensor:
    """As `random_integers`, at arbitrary positions of a stream. int64 [n] -> int64 [n]."""
    key = _mix(_mix(torch.tensor([seed], device=positions.device)) + stream * 2 + 1)
    return _mix(_mix((positions + 1) * _INCREMENT) ^ key)


def rademacher(seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Signs +1 and -1. float32 [count]."""
    return 1.0 - 2.0 * _shift_right(random_integers(seed, stream, start, count, device), 63).float()


def uniforms(seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """In [0, 1). float64 [count]."""
    return _shift_right(random_integers(seed, stream, start, count, device), 11).double() / 2**53


def gaussian(seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal draws, sqrt(-2 log u) cos(2 pi v) of uniforms u, v (Box and Muller 1958). float32 [count]."""
    integers = random_integers(seed, stream, start, count, device)
    u = (_shift_right(integers, 32).double() + 0.5) / 2**32
    v = (integers & 0xFFFFFFFF).double() / 2**32
    return ((-2 * u.log()).sqrt() * (2 * math.pi * v).cos()).float()
