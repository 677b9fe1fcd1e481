"""Selection on curves whose answer is known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradtrace.checkpoints.selection import choose, least_falls, refusals, weakest

pytestmark = pytest.mark.unit

finite = st.floats(0, 10, allow_nan=False)


def test_a_loss_that_falls_evenly_is_divided_evenly() -> None:
    losses = [16.0 - step for step in range(17)]
    assert choose(losses, 4) == [4, 8, 12, 16]
    assert choose(losses, 8) == [2, 4, 6, 8, 10, 12, 14, 16]


def test_where_the_loss_falls_twice_as_fast_twice_as_many_are_chosen() -> None:
    fast = [30.0 - 2 * step for step in range(11)]  # 20 in ten steps
    slow = [10.0 - step for step in range(1, 11)]  # 10 in ten steps
    chosen = choose(fast + slow, 16)
    inside = [position for position in chosen if position < 20]
    assert sum(position <= 10 for position in inside) == 2 * sum(position > 10 for position in inside)


def test_of_an_exponential_fall_equal_parts_are_chosen() -> None:
    losses = [math.exp(-step / 20) for step in range(101)]
    chosen = choose(losses, 6)
    levels = [losses[0], *(losses[position] for position in chosen)]
    parts = [before - after for before, after in pairwise(levels)]
    assert chosen[-1] == 100
    assert max(parts) < 2.1 * min(parts)  # each is made of merged neighbours: at most a factor of two apart
    assert chosen[3] < 40


def test_a_fluctuating_start_and_a_converged_end_are_refused() -> None:
    start = [2.0, 2.3, 1.9, 2.4, 1.95, 2.2]
    fall = [1.8 - 0.2 * step for step in range(8)]
    end = [0.4 - 0.00001 * step for step in range(1, 20)]
    losses = start + fall + end
    falling = range(len(start), len(start) + len(fall))
    assert set(choose(losses, 9)) <= {*falling, len(losses) - 1}
    reasons = refusals(losses)
    assert all("not fall steadily" in str(reason) for reason in reasons[1 : len(start) - 1])
    assert "first" in str(reasons[0])
    assert all("hardly falls" in str(reason) for reason in reasons[-15:-1])
    assert all(reasons[position] is None for position in falling[:-1])


def test_a_curve_without_a_steady_fall_leaves_the_last_alone() -> None:
    assert choose([1.0, 2.0, 1.0, 2.0, 1.0], 3) == [4]
    assert choose([1.0] * 6, 3) == [5]
    assert choose([1.0], 3) == [0]


def test_losses_that_are_not_finite_are_no_fall() -> None:
    losses = [3.0, 2.0, 1.0, math.nan, 0.5, 0.4, 0.3, math.inf]
    assert least_falls(losses) == [
        -math.inf,
        1.0,
        -math.inf,
        -math.inf,
        -math.inf,
        pytest.approx(0.1),
        -math.inf,
        -math.inf,
    ]
    assert choose(losses, 5) == [1, 5, 7]


def test_an_unsteady_checkpoint_is_given_up_before_any_steady_one() -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 2.0, 1.9, 1.8]
    assert weakest(losses, [1, 3, 4, 5, 6]) == 1
    assert weakest(losses, [3, 4, 5, 6]) == 5  # of 3 to 6, 4 to 1.9 and 2 to 1.8 the last is the least


@given(losses=st.lists(finite, min_size=1, max_size=40), count=st.integers(1, 10))
def test_the_chosen_are_few_ascending_steady_and_end_with_the_last(losses: list[float], count: int) -> None:
    chosen = choose(losses, count)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == len(losses) - 1
    assert len(chosen) <= count
    assert all(refusals(losses)[position] is None for position in chosen[:-1])


@given(losses=st.lists(finite, min_size=2, max_size=30), scale=st.floats(0.1, 10), shift=st.floats(0, 5))
def test_the_choice_does_not_depend_on_the_unit_of_a_strictly_falling_loss(
    losses: list[float], scale: float, shift: float
) -> None:
    whole = sorted({round(loss) for loss in losses}, reverse=True)  # integers: no rounding decides
    assert choose([2.0 * loss for loss in whole], 4) == choose([float(loss) for loss in whole], 4)
    assert [r is None for r in refusals([4 * loss + 8.0 for loss in whole])] == [r is None for r in refusals(whole)]
