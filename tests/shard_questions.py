"""Questions to shards that no index asks: a module of its own, which the shards' processes import."""

from __future__ import annotations

import os
import signal
import time


def pid(shard: object) -> int:
    return os.getpid()


def dies(shard: object) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def sleeps(shard: object) -> int:
    time.sleep(1)
    return 1


def fails(shard: object) -> int:
    raise MemoryError("too much was asked")
