"""Selecting checkpoints to keep: those around which the training loss falls steadily.

Pruthi et al. 2020, "Choosing checkpoints": sample where the loss decreases steadily, more often where it decreases
faster, not at the fluctuating start and not after convergence. As a rule on the losses of all checkpoints, in the order
of their steps:

1. A checkpoint is *steady* if the loss falls both before and after it, on each side by more than `LEAST` times the
   difference of the highest and the lowest loss. The first checkpoint is not steady: its loss before is unknown.
2. Of the steady checkpoints, the first to remove is the one between whose neighbours the loss falls least. The rest
   divides the fall of the loss evenly, not the time: if the loss falls linearly, the steps are even; if exponentially,
   most are early.
3. The last checkpoint is always kept, since answers report its predictions and losses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

LEAST = 0.001


def least_falls(losses: Sequence[float]) -> list[float]:
    """The smaller of the falls of the loss before and after each checkpoint; minus infinity if one of them is unknown.

    A fall to or from a loss that is NaN or infinite is unknown.
    """
    falls = [earlier - later for earlier, later in pairwise(losses)]
    falls = [fall if math.isfinite(fall) else -math.inf for fall in falls]
    return [min(pair) for pair in zip([-math.inf, *falls], [*falls, -math.inf], strict=True)]


def refusals(losses: Sequence[float]) -> list[str | None]:
    """The reason why each checkpoint is not steady; None if it is."""
    limit = LEAST * _whole_fall(losses)
    reasons = [_refusal(fall, limit) for fall in least_falls(losses)]
    reasons[:1] = ["the first: whether the loss fell steadily to it is unknown"]
    return reasons


def choose(losses: Sequence[float], count: int) -> list[int]:
    """Positions of at most `count` checkpoints, ascending: the last one, and steady ones before it."""
    last = len(losses) - 1
    kept = [position for position, refusal in enumerate(refusals(losses)) if refusal is None or position == last]
    while len(kept) > max(count, 1):
        kept.remove(weakest(losses, kept))
    return kept


def weakest(losses: Sequence[float], kept: Sequence[int]) -> int:
    """Which of the `kept` positions (ascending, two or more) to remove first; never the last.

    Of the checkpoints that are not steady, the one with the smallest of `least_falls`. If all are steady, the one
    between whose kept neighbours the loss falls least; the highest loss counts as the neighbour before the first.
    """
    falls, limit = least_falls(losses), LEAST * _whole_fall(losses)
    unsteady = [position for position in kept[:-1] if not falls[position] > limit]
    if unsteady:
        return min(unsteady, key=lambda position: falls[position])
    before = [max(_finite(losses)), *(losses[position] for position in kept)]
    gaps = [before[i] - losses[after] for i, after in enumerate(kept[1:])]
    return kept[gaps.index(min(gaps))]


def _refusal(fall: float, limit: float) -> str | None:
    if fall == -math.inf:
        return "the loss after it is unknown or not finite"
    if fall <= 0:
        return f"the loss does not fall steadily around it: it rises by {-fall:.2g} on one side"
    return None if fall > limit else f"the loss hardly falls around it any more: by {fall:.2g}"


def _whole_fall(losses: Collection[float]) -> float:
    finite = _finite(losses)
    return max(finite) - min(finite)


def _finite(losses: Collection[float]) -> list[float]:
    return [loss for loss in losses if math.isfinite(loss)] or [0.0]
