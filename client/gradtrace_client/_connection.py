"""The address, headers and limits of a client's connections."""

from __future__ import annotations

import httpx

from gradtrace_client._errors import ClientError
from gradtrace_client._responses import VERSION

TIMEOUT = httpx.Timeout(70.0, connect=10.0)  # longer than the service's own deadline (60 s), whose error says more
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)


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
