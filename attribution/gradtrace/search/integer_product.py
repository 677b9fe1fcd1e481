"""Products of int8 matrices, summed in int32: as fast as memory is read, where processor and library have them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gradtrace.devices import threads

LARGEST_CODE = 127
MOST_COLUMNS = (2**31 - 1) // (2**7 * LARGEST_CODE)  # whose products fit into int32, whatever the codes are

_PROBE_ROWS, _PROBE_COLUMNS, _PROBE_TIMES = 512, 1024, 20
_PROBE_VECTORS = (1, 16)  # products with a vector and with a matrix are computed in different ways
_ODD_SHAPES = ((1, 9, 1), (7, 33, 5), (50, 2, 17), (64, 1, 3), (65, 224, 48))  # rows, columns, vectors
_LEAST_GAIN = 2.0  # times as fast as the float32 product of the same shape, in the processor's cache
# PyTorch's integer product has no public name yet; it is the same in all releases since 2.1.
_PRODUCT: Callable[..., Tensor] | None = getattr(torch, "_int_mm", None)


def integer_product(vectors: Tensor, codes: Tensor, out: Tensor) -> None:
    """out = vectors @ codes.T.  int8 [n, w] x int8 [m, w] -> int32 [n, m], with w <= MOST_COLUMNS.

    In this order, the many rows of `codes` are read in half the time of codes @ vectors.T where n > 1.
    """
    assert _PRODUCT is not None  # else `is_usable` is False
    if codes.shape[1] == 1:  # PyTorch 2.13 takes the strides of such matrices for others
        torch.mul(vectors.int(), codes.int().T, out=out)
    else:
        _PRODUCT(vectors, codes.T, out=out)


@cache
def is_usable() -> bool:
    """Whether this processor and this PyTorch have an integer product that is exact and fast: tried once in a process.

    Processors without instructions for whole products (VNNI and their like) add pairs of products in 16 bits, where
    large ones saturate, or multiply one by one, far slower than in float32.
    """
    if _PRODUCT is None:
        return False
    try:
        large = all(_is_exact(code, count) for code in (LARGEST_CODE, -128) for count in _PROBE_VECTORS)
        return large and all(_is_exact_for(*shape) for shape in _ODD_SHAPES) and _is_fast()
    except RuntimeError:  # not in this build
        return False


def _probe(code: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, rows and their products to be."""
    vectors = torch.full((count, _PROBE_COLUMNS), LARGEST_CODE, dtype=torch.int8)
    rows = torch.full((_PROBE_ROWS, _PROBE_COLUMNS), code, dtype=torch.int8)
    return vectors, rows, torch.empty(count, _PROBE_ROWS, dtype=torch.int32)


def _is_exact(code: int, count: int) -> bool:
    vectors, rows, products = _probe(code, count)
    integer_product(vectors, rows, products)
    return bool((products == code * LARGEST_CODE * _PROBE_COLUMNS).all())


def _is_exact_for(rows: int, columns: int, count: int) -> bool:
    codes = (torch.arange(rows * columns) * 37 % 255 - 127).view(rows, columns)
    vectors = (torch.arange(count * columns) * 91 % 255 - 127).view(count, columns)
    products = torch.empty(count, rows, dtype=torch.int32)
    integer_product(vectors.to(torch.int8), codes.to(torch.int8), products)
    return torch.equal(products.double(), vectors.double() @ codes.double().T)


def _is_fast() -> bool:
    vectors, rows, products = _probe(1, 1)
    floats, float_vector = rows.float(), vectors[0].float()
    with threads(1):
        seconds = _fastest(lambda: integer_product(vectors, rows, products))
        return _LEAST_GAIN * seconds < _fastest(lambda: floats @ float_vector)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(_PROBE_TIMES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
