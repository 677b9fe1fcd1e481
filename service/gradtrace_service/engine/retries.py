"""For how long a batch is computed before its worker is given up, and how its requests are tried again.

Half of the deadline is a batch's: a pass takes a second, so one that takes so long holds a request that hangs. Its
requests are then tried again one by one, each for its share of the time that is left. Only the one that hangs is told
that it took too long. A request by itself has its whole deadline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from gradtrace_service.engine.fair_queue import Waiting

_LONGEST_GRACE_SECONDS = 1.0  # beyond the deadline, in which a request that is just late spares the worker
_SHORTEST_BATCH_SECONDS = 2.0
_SHORTEST_SHARE_SECONDS = 1.0


def half(deadline: float) -> float:
    """Seconds that a worker has for a batch, or to say that it is there: its requests are then tried in the rest."""
    return max(deadline / 2, _SHORTEST_BATCH_SECONDS)


def longest_pass(batch: Sequence[Waiting], replaceable: bool, deadline: float) -> float:
    """Seconds after which a worker that computes this batch is given up.

    replaceable: whether a new one takes its place;  deadline: seconds that a request may take
    """
    grace = min(deadline / 10, _LONGEST_GRACE_SECONDS)
    if not replaceable:
        return deadline + _LONGEST_GRACE_SECONDS
    if len(batch) > 1:
        return half(deadline)
    left = max(batch[0].expires - time.perf_counter(), 0.0) + grace
    return left if batch[0].patience is None else min(left, batch[0].patience)


def leave_alone(batch: Sequence[Waiting], late: bool) -> None:
    """Mark requests whose worker was lost, so that they are tried again one by one."""
    left = min(waiting.expires for waiting in batch) - time.perf_counter()
    for waiting in batch:
        waiting.alone = True
        waiting.losses += not late
        if late:
            waiting.patience = max(left / len(batch), _SHORTEST_SHARE_SECONDS)
