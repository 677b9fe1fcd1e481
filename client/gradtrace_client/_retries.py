"""When a request is sent again, and after how long."""

from __future__ import annotations

from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, wait_combine, wait_exponential
from tenacity.wait import wait_random_exponential

from gradtrace_client._errors import BusyError

LONGEST_WAIT = 30.0  # seconds; a service that asks for more is not asked again

_UNSENT = (httpx.ConnectTimeout, httpx.ConnectError, httpx.PoolTimeout)
# Read time-outs are left out: the service may still be working on the first request.
_LOST = (*_UNSENT, httpx.NetworkError, httpx.RemoteProtocolError)


def retry_policy(retries: int, repeatable: bool) -> dict[str, Any]:
    """Arguments of tenacity's Retrying and AsyncRetrying.

    repeatable: whether a request whose answer was lost may be sent again, though it may have been carried out
    """
    lost = _LOST if repeatable else _UNSENT
    return {
        "retry": retry_if_exception(lambda error: isinstance(error, BusyError) or isinstance(error.__cause__, lost)),
        "stop": lambda state: state.attempt_number > retries or state.upcoming_sleep > LONGEST_WAIT,
        # The random part, on top of what the service asks for, separates clients that failed together.
        "wait": wait_combine(wait_exponential(0.2), wait_random_exponential(0.1), _asked_wait),
        "reraise": True,
    }


def _asked_wait(retry_state: RetryCallState) -> float:
    error = retry_state.outcome.exception() if retry_state.outcome else None
    return max(error.retry_after or 0.0, 0.0) if isinstance(error, BusyError) else 0.0
