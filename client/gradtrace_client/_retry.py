"""When to send a call again, and after how long."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime

import httpx

FIRST_WAIT = 0.2  # seconds, doubled at each attempt
LONGEST_WAIT = 30.0  # a service that asks for more patience is not asked again

_BUSY = (429, 503)
_UNSENT = (httpx.ConnectTimeout, httpx.ConnectError, httpx.PoolTimeout)
# A time-out while reading is not among them: the service may still be at work on the first copy.
_LOST = (*_UNSENT, httpx.NetworkError, httpx.RemoteProtocolError)


def wait_before_retry(outcome: httpx.Response | httpx.RequestError, attempt: int, repeatable: bool) -> float | None:
    """Seconds to wait before attempt `attempt + 1` (the first is 0); None: do not try again.

    repeatable: whether a request that may have been carried out, its answer lost, may be sent again
    """
    backoff = FIRST_WAIT * 2.0**attempt * random.uniform(1.0, 1.5)  # jitter spreads clients that failed together
    if isinstance(outcome, _LOST if repeatable else _UNSENT):
        return backoff
    if isinstance(outcome, httpx.RequestError) or outcome.status_code not in _BUSY:
        return None
    asked = retry_after(outcome)
    wait = backoff + max(asked or 0.0, 0.0)  # those that were refused together must not come back together
    return wait if wait <= LONGEST_WAIT else None


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the Retry-After header asks for, as a number or as a date; None without a usable one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    wait: timedelta = moment - datetime.now(timezone.utc)
    return wait.total_seconds()
