"""Ray (https://docs.ray.io), which is optional: importing it, and joining a cluster."""

from __future__ import annotations

import socket
from typing import Any

from gradtrace.errors import MissingLibraryError, StoreError

LOCAL = "local"  # in place of a cluster's address: one of this machine alone, for as long as this process needs it
_CONNECT_SECONDS = 10.0


def import_ray() -> Any:
    """The ray module. Raises MissingLibraryError if it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise MissingLibraryError("ray", "ray") from None
    return ray


def join(ray: Any, address: str) -> bool:
    """Connect this process to a cluster, unless it is connected to one. Returns whether it was not.

    address: as `ray.init` takes it ("auto": the cluster that this machine belongs to), or "local"

    Raises:
        StoreError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    try:
        _check_answers(address)  # Ray itself would wait for minutes
        ray.init(address, log_to_driver=False, **({"include_dashboard": False} if address == LOCAL else {}))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"there is no Ray cluster at {address!r} ({error}): start one with `ray start --head`, or say --ray local"
        ) from None
    return True


def _check_answers(address: str) -> None:
    """Raises OSError where nothing listens at an address with a port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
