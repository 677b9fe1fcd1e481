"""The learning rate of every step of a training, interpolated from the few that frameworks save.

Between two known rates the interpolation is linear: exact for linear schedules, close for smooth ones. Before the first
known rate it starts at the optimizer's initial rate; or, if the rate rises, on the line through the first two known
rates, if that is lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.readers.base import Reading

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KnownRates:
    """Known learning rates of a schedule.

    positions: steps of the schedule, ascending
    rates: at these positions
    initial: the rate at the start of the schedule; None: unknown
    """

    positions: Sequence[float]
    rates: Sequence[float]
    initial: float | None

    def at(self, positions: Doubles, start: int) -> Doubles:
        """The interpolated rates at `positions`, which are at least `start`, the first step of the schedule.

        After the last known rate, that rate.
        """
        first = [] if self.positions[0] <= start else [(start, self._start(start))]
        known = [*first, *zip(self.positions, self.rates, strict=True)]
        return np.interp(positions, [position for position, _ in known], [rate for _, rate in known])

    def _start(self, start: int) -> float:
        """The rate at step `start`, before the first known rate."""
        slope = 0.0
        if len(self.rates) > 1:
            slope = (self.rates[1] - self.rates[0]) / (self.positions[1] - self.positions[0])
        extrapolated = max(self.rates[0] - slope * (self.positions[0] - start), 0.0)
        if self.initial is None:
            return extrapolated
        return min(extrapolated, self.initial) if slope > 0 else self.initial


def with_rates_of_steps(readings: Sequence[Reading]) -> list[Checkpoint]:
    """The checkpoints of a training, ordered by step, with the rate of their step and the sum of the rates up to it.

    A saved optimizer holds the rate of the next step only. Scheduler and optimizer steps may differ: if a scheduler
    steps once an epoch, the rate is constant in between.
    """
    checkpoints = [reading.checkpoint for reading in readings]
    next_rates = [reading.next_rate for reading in readings if reading.next_rate]
    if len(next_rates) < len(readings):
        return checkpoints
    steps = [checkpoint.step for checkpoint in checkpoints]
    counts = [rate.scheduled for rate in next_rates]
    scheduled = [step if count is None else count for step, count in zip(steps, counts, strict=True)]
    if None in counts or any(after < before for before, after in zip([0, *scheduled], scheduled, strict=False)):
        scheduled = steps
    rates = _rates_of_steps(steps, scheduled, [rate.rate for rate in next_rates], next_rates[0].initial)
    sums = [0.0, *rates.cumsum().tolist()]  # up to step 0, 1, ...
    return [
        replace(
            checkpoint,
            learning_rate=float(rates[checkpoint.step - 1]) if checkpoint.step else checkpoint.learning_rate,
            learning_rate_sum=sums[checkpoint.step],
        )
        for checkpoint in checkpoints
    ]


def _rates_of_steps(
    steps: Sequence[int], scheduled: Sequence[int], rates: Sequence[float], initial: float | None
) -> Doubles:
    """The rates of steps 1 to the last of `steps`. float64 [steps[-1]].

    scheduled: number of scheduler steps up to each of `steps`.  rates: at these scheduler steps
    """
    positions: list[Doubles] = [np.zeros(0)]  # of each optimizer step in the schedule
    for since, until, before, after in zip([0, *steps], steps, [0, *scheduled], scheduled, strict=False):
        passed = np.arange(until - since)
        positions.append((before + passed * (after - before) // max(until - since, 1)).astype(np.float64))
    distinct, first = np.unique(scheduled, return_index=True)
    known = KnownRates(distinct.tolist(), [rates[number] for number in first], initial)
    return known.at(np.concatenate(positions), 0)
