"""SIGTERM under clients: `python -m benchmarks.restarts digits --index DIR --times 20 --clients 32`.

Each client asks one question after the other over a connection that it keeps for as long as the service lets it, and
asks at once again after 503. The service is ended by SIGTERM and started again. Failed are requests that were reset or
left without an answer, answers other than 200 and 503 with Retry-After, and connections that were refused before the
process had ended.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.datasets import DATASETS, task_spec
from benchmarks.serving import served

_BODY = json.dumps({"query_rows": [0], "k": 3})
_HEADERS = {"Content-Type": "application/json"}
_CLIENT_SECONDS = 120.0  # until a client gives up
_END_SECONDS = 0.5  # a process's sockets are closed a little before it is seen to have ended


class Clients:
    """What happened to the requests of some clients, until the port is refused to all of them."""

    def __init__(self, url: str, count: int) -> None:
        self.happened: Counter[str] = Counter()
        self.refused: list[float] = []  # when
        self._address = urlsplit(url).netloc
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(count)
        self._clients = [self._pool.submit(self._client) for _ in range(count)]

    def _client(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=_CLIENT_SECONDS)
        while True:
            try:
                happened = _ask(connection)
            except ConnectionRefusedError:
                with self._lock:
                    self.refused.append(time.monotonic())
                return
            except (OSError, http.client.HTTPException) as error:
                happened = type(error).__name__
                connection.close()
            with self._lock:
                self.happened[happened] += 1

    def failed(self, ended: float) -> dict[str, int]:
        """Wait for the clients. What was neither 200 nor 503. ended: when the service's process was seen to have"""
        self._pool.shutdown()
        for client in self._clients:
            client.result()
        early = sum(moment < ended - _END_SECONDS for moment in self.refused)
        failed = {what: count for what, count in self.happened.items() if what not in ("200", "503")}
        return failed | ({"refused before the end": early} if early else {})


def _ask(connection: http.client.HTTPConnection) -> str:
    connection.request("POST", "/influence", _BODY, _HEADERS)
    response = connection.getresponse()
    response.read()
    without = response.status == 503 and not response.headers["Retry-After"]
    return f"{response.status}" + (" without Retry-After" if without else "")


def restart(index: Path, task: str, clients: int, seconds: float, *flags: str) -> tuple[Clients, dict[str, int], float]:
    """Serve for some seconds, then SIGTERM. The clients, what failed, and the seconds from the signal to the end."""
    with served(index, task, *flags) as service:
        asking = Clients(service.url, clients)
        time.sleep(seconds)
        process, told = psutil.Process(service.process), time.monotonic()
        process.terminate()
        process.wait()
        ended = time.monotonic()
    return asking, asking.failed(ended), ended - told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="before each SIGTERM")
    parser.add_argument("--grace-seconds", type=float, default=2.0)
    options = parser.parse_args()
    print("| time | seconds to the end | 200 | 503 | failed |\n|--:|--:|--:|--:|---|")
    for time_ in range(1, options.times + 1):
        asked, failed, took = restart(
            options.index,
            task_spec(options.dataset),
            options.clients,
            options.seconds,
            "--grace-seconds",
            str(options.grace_seconds),
        )
        failures = ", ".join(f"{count} x {what}" for what, count in failed.items()) or "none"
        print(f"| {time_} | {took:.1f} | {asked.happened['200']} | {asked.happened['503']} | {failures} |", flush=True)


if __name__ == "__main__":
    main()
