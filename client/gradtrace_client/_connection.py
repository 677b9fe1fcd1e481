"""The address, headers and limits of a client's connections, and when a request is sent again."""

from __future__ import annotations

from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, wait_combine, wait_exponential
from tenacity.wait import wait_random_exponential

from gradtrace_client._errors import BusyError, ClientError
from gradtrace_client._responses import VERSION

TIMEOUT = httpx.Timeout(70.0, connect=10.0)  # longer than the service's own deadline (60 s), whose error says more
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)
LONGEST_WAIT = 30.0  # seconds; a service that asks for more is not asked again

_UNSENT = (httpx.ConnectTimeout, httpx.ConnectError, httpx.PoolTimeout)
# Read time-outs are left out: the service may still be working on the first request.
_LOST = (*_UNSENT, httpx.NetworkError, httpx.RemoteProtocolError)


def checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ClientError(f"{url!r} is not the address of a service; write it as http://HOST:PORT or https://HOST")
    return url


def request_headers(api_key: str | None) -> dict[str, str]:
    headers = {"User-Agent": f"gradtrace-client/{VERSION}"}
    if api_key is not None:
        key = api_key.strip()  # a key that was read from a file ends with a newline
        if not (key.isascii() and key.isprintable()):  # httpx would show the key in its error
            raise ClientError("the API key has characters that no header may hold; copy it again from its source")
        headers["Authorization"] = f"Bearer {key}"
    return headers


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
