"""Rows in fewer bytes: how near they come back, at any magnitude."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.errors import StoreError
from gradtrace.store.manifest import Precision
from gradtrace.store.precision import (
    STORED_DTYPES,
    column_scales,
    decode,
    encode,
    pack,
    stored_width,
    tail_norms,
    unpack,
)

pytestmark = pytest.mark.unit

PRECISIONS: list[Precision] = ["float16", "int8", "int4"]
STEP = {"float16": 2.0**-11, "int8": 0.5 / 127}  # the largest error, as a share of the row's largest coordinate
FINEST = 2.0**-127  # half of the smallest scale, in which the values of even smaller rows are counted


def spread_rows(seed: int, rows: int, columns: int, exponents: tuple[float, float]) -> torch.Tensor:
    """Normal rows whose sizes spread evenly over powers of ten, [rows, columns] float32."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(*exponents, (rows, 1))
    return torch.from_numpy((rng.standard_normal((rows, columns)) * sizes).astype(np.float32))


def scales_of_columns(precision: Precision, columns: int, seed: int = 0) -> torch.Tensor | None:
    """As an int4 index has them: at most one, over five powers of ten."""
    if precision != "int4":
        return None
    return torch.from_numpy(10.0 ** np.random.default_rng(seed).uniform(-5, 0, columns)).float()


@pytest.mark.parametrize("precision", STEP)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 40), low=st.integers(-36, 28))
def test_rows_come_back_within_half_a_step_at_any_magnitude(
    precision: Precision, seed: int, columns: int, low: int
) -> None:
    rows = spread_rows(seed, 8, columns, (low, low + 1.5))
    stored, scales = encode(rows, precision)
    assert stored.dtype == STORED_DTYPES[precision]
    assert scales.dtype == torch.float32
    error = (decode(stored, scales).double() - rows.double()).abs()
    allowed = rows.abs().amax(1, keepdim=True).double() * STEP[precision] * (1 + 1e-6)
    assert (error <= allowed.clamp_min(FINEST)).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 40), low=st.integers(-30, 28))
def test_int4_rows_come_back_within_half_a_step_of_their_column_or_clipped(seed: int, columns: int, low: int) -> None:
    rows, scales = spread_rows(seed, 8, columns, (low, low + 1.5)), scales_of_columns("int4", columns, seed)
    assert scales is not None
    stored, row_scales = encode(rows, "int4", scales)
    assert (stored.dtype, stored.shape) == (torch.uint8, (8, stored_width(columns, "int4")))
    even = rows.double() / scales.double()
    error = (decode(stored, row_scales, scales).double() / scales.double() - even).abs()
    clipped = 4 * rows.double().norm(dim=1, keepdim=True) / scales.double().norm()
    steps = torch.minimum(even.abs().amax(1, keepdim=True), clipped) / 7
    torch.testing.assert_close(row_scales[:, None].double(), steps.clamp_min(2.0**-126), rtol=1e-5, atol=0)
    assert ((error <= steps / 2 * (1 + 1e-5)) | (even.abs() > clipped)).all()
    assert (error <= even.abs() * (1 + 1e-5) + steps).all()


@settings(max_examples=50, deadline=None)
@given(codes=st.lists(st.integers(-7, 7), min_size=1, max_size=9))
def test_two_codes_share_a_byte_the_earlier_in_its_lower_half(codes: list[int]) -> None:
    packed = pack(torch.tensor([codes], dtype=torch.int8))
    nibbles = [nibble for byte in packed[0].tolist() for nibble in (byte % 16, byte // 16)]
    assert [nibble - 8 for nibble in nibbles] == codes + [0] * (len(codes) % 2)
    assert unpack(packed, len(codes))[0].tolist() == codes


def test_column_scales_follow_the_root_mean_square_and_are_never_zero() -> None:
    scales = column_scales(torch.tensor([4.0, 1.0, 0.25, 0.0]), rows=1000)
    torch.testing.assert_close(scales[:3], torch.tensor([1.0, 0.5, 0.25]) ** 0.75, rtol=3e-3, atol=0)
    assert 0.02 < scales[3] < 0.06  # one row in a thousand may have as much energy there as rows have on average
    assert column_scales(torch.zeros(3), rows=10).tolist() == [1, 1, 1]


def test_float16_keeps_three_digits_of_coordinates_far_below_the_largest() -> None:
    rows = torch.tensor([[1e20, 1e20 * 2.0**-28], [3e-20, 3e-20 * 2.0**-28]])
    decoded = decode(*encode(rows, "float16"))
    assert ((decoded - rows).abs() <= rows.abs() * 2.0**-11).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_rows_stay_zero_and_leave_others_alone(precision: Precision) -> None:
    rows = torch.zeros(3, 5)
    rows[1] = torch.arange(5)
    of_columns = scales_of_columns(precision, 5)
    stored, scales = encode(rows, precision, of_columns)
    assert torch.isfinite(scales).all()
    decoded = decode(stored, scales, of_columns)
    assert torch.equal(decoded[[0, 2]], torch.zeros(2, 5))
    assert torch.equal(decoded[1], decode(*encode(rows[1:2], precision, of_columns), of_columns)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_code_depends_on_that_row_alone(precision: Precision) -> None:
    rows = spread_rows(0, 33, 100, (-20, 20))
    of_columns = scales_of_columns(precision, 100)
    stored, scales = encode(rows, precision, of_columns)
    for row in range(33):
        alone, scale = encode(rows[row : row + 1], precision, of_columns)
        assert torch.equal(alone[0], stored[row])
        assert torch.equal(scale[0], scales[row])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e35])
def test_what_float32_scores_cannot_hold_is_refused_with_its_row(precision: Precision, value: float) -> None:
    rows = torch.ones(4, 3)
    rows[2, 1] = value
    with pytest.raises(StoreError, match="row 2 of this batch"):
        encode(rows, precision, scales_of_columns(precision, 3))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), low=st.integers(-36, 20))
def test_tail_norms_bound_the_exact_ones_closely(seed: int, low: int) -> None:
    rows = spread_rows(seed, 6, 20, (low, low + 6))
    rows[0] = 0
    tails = tail_norms(rows, [3, 4, 20]).double().numpy()
    for level, start in enumerate([0, 3, 4]):
        exact = np.sqrt(np.square(rows[:, start:].double().numpy()).sum(axis=1))
        assert (tails[:, level] >= exact).all()
        assert (tails[:, level] <= exact * (1 + 3e-7) + 1e-44).all()
