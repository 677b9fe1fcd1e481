"""Which checkpoints to keep: those around which the training loss falls, and falls steadily.

Pruthi et al. 2020, "Choosing checkpoints": sample where the loss decreases steadily, more often where it decreases
faster, not at the fluctuating start and not after convergence. As a rule on the losses of all checkpoints, in the order
of their steps:

1. A checkpoint is *steady* where the loss fell to it and falls from it, on the lesser side by more than `LEAST` of the
   whole fall. The first has no before, so that nothing is known of its steadiness.
2. Of the steady ones, the checkpoint is given up first between whose neighbours the loss falls least. What remains
   divides the fall, not the time, evenly: a linear loss gives even steps, an exponential one gives early ones.
3. The last is always kept: the predictions and losses in answers are its.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

LEAST = 0.001


def least_falls(losses: Sequence[float]) -> list[float]:
    """By how much the loss falls on the lesser side of each checkpoint; minus infinity where a side is unknown.

    A loss that is NaN or infinite is no fall on either side of it.
    """
    falls = [earlier - later for earlier, later in pairwise(losses)]
    falls = [fall if math.isfinite(fall) else -math.inf for fall in falls]
    return [min(pair) for pair in zip([-math.inf, *falls], [*falls, -math.inf], strict=True)]


def refusals(losses: Sequence[float]) -> list[str | None]:
    """Why each checkpoint is not steady; None where it is."""
    limit = LEAST * _whole_fall(losses)
    found = [_refusal(fall, limit) for fall in least_falls(losses)]
    found[:1] = ["the first: whether the loss fell steadily to it is unknown"]
    return found


def choose(losses: Sequence[float], count: int) -> list[int]:
    """The positions of at most `count` checkpoints in ascending order: the last, and steady ones before it."""
    last = len(losses) - 1
    kept = [position for position, refusal in enumerate(refusals(losses)) if refusal is None or position == last]
    while len(kept) > max(count, 1):
        kept.remove(weakest(losses, kept))
    return kept


def weakest(losses: Sequence[float], kept: Sequence[int]) -> int:
    """Which of the `kept` positions (ascending, two or more) to give up first; never the last.

    A checkpoint that is not steady, the one with the least fall; if all are steady, the one between whose kept
    neighbours the loss falls least, the highest loss standing before the first.
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
