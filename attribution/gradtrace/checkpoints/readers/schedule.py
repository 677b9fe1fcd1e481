"""The learning rate of every step of a training, from the few that frameworks write down.

Between two known rates it is taken to go in a straight line, which is right for linear schedules and near for smooth
ones; before the first it begins at the optimizer's initial rate or, while the rate still rises, further down that line.
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
    """positions: ascending, of a schedule's steps;  rates: at these;  initial: what the schedule began from"""

    positions: Sequence[float]
    rates: Sequence[float]
    initial: float | None

    def at(self, positions: Doubles, start: int) -> Doubles:
        """The rates at `positions`, none before `start`. After the last known one, that."""
        first = [] if self.positions[0] <= start else [(start, self._start(start))]
        known = [*first, *zip(self.positions, self.rates, strict=True)]
        return np.interp(positions, [position for position, _ in known], [rate for _, rate in known])

    def _start(self, start: int) -> float:
        slope = 0.0
        if len(self.rates) > 1:
            slope = (self.rates[1] - self.rates[0]) / (self.positions[1] - self.positions[0])
        drawn = max(self.rates[0] - slope * (self.positions[0] - start), 0.0)
        if self.initial is None:
            return drawn
        return min(drawn, self.initial) if slope > 0 else self.initial


def with_rates_of_steps(readings: Sequence[Reading]) -> list[Checkpoint]:
    """The checkpoints of a training, ordered by step, with the rates of their own steps and the sums of all up to them.

    A saved optimizer holds the rate of the step after. How often its schedule had moved on is told for some: a schedule
    that moves once in an epoch holds its rate in between.
    """
    if not all(reading.next_rate for reading in readings):
        return [reading.checkpoint for reading in readings]
    ahead = [reading.next_rate for reading in readings if reading.next_rate]
    steps = [reading.checkpoint.step for reading in readings]
    counts = [rate.scheduled for rate in ahead]
    moved = [step if count is None else count for step, count in zip(steps, counts, strict=True)]
    if None in counts or any(after < before for before, after in zip([0, *moved], moved, strict=False)):
        moved = steps
    rates = _rates_of_steps(steps, moved, [rate.rate for rate in ahead], ahead[0].initial)
    sums = rates.cumsum()
    return [
        replace(
            reading.checkpoint,
            learning_rate=float(rates[reading.checkpoint.step - 1]),
            learning_rate_sum=float(sums[reading.checkpoint.step - 1]),
        )
        if reading.checkpoint.step
        else replace(reading.checkpoint, learning_rate_sum=0.0)
        for reading in readings
    ]


def _rates_of_steps(
    steps: Sequence[int], moved: Sequence[int], rates: Sequence[float], initial: float | None
) -> Doubles:
    """Of steps 1 to the last. moved: how often the schedule had moved on after each of `steps`; rates: there."""
    positions: list[Doubles] = [np.zeros(0)]
    for since, until, before, after in zip([0, *steps], steps, [0, *moved], moved, strict=False):
        past = np.arange(until - since)
        positions.append((before + past * (after - before) // max(until - since, 1)).astype(np.float64))
    at, first = np.unique(moved, return_index=True)
    known = KnownRates(at.tolist(), [rates[place] for place in first], initial)
    return known.at(np.concatenate(positions), 0)
