"""`gradtrace serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_SERVE = [sys.executable, "-m", "gradtrace_service", "serve"]


class Served(NamedTuple):
    url: str
    process: int  # its id


@contextmanager
def served(index: Path | str, task: str, *flags: str) -> Iterator[Served]:
    """A service, from the moment when it listens to the end of the block."""
    with tempfile.TemporaryFile("w+") as log:
        words = [*_SERVE, str(index), "--task", task, "--port", "0", *flags]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield Served(_address(server, Path(f"/proc/self/fd/{log.fileno()}")), server.pid)
        finally:
            server.terminate()
            server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    while not (found := re.search(r"running on (http://[\d.]+:\d+)", log.read_text())):
        if server.poll() is not None:
            sys.exit(f"gradtrace serve ended: {log.read_text()}")
        time.sleep(0.05)
    return found.group(1)
