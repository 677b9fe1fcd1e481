"""Clients of one index, or one client among others, do not take the workers' time from the rest."""

from __future__ import annotations

import asyncio
import heapq
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import digits_task
from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace_service.app import create_service
from gradtrace_service.engine.fair_queue import FairQueue, Waiting
from gradtrace_service.engine.work import Work
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

BATCH = 16
PASS_SECONDS: dict[str, Callable[[int], float]] = {
    "large": lambda queries: 0.06 + 0.022 * queries,  # as an index of 50,000 rows
    "small": lambda queries: 0.006 + 0.006 * queries,
}
RETURN_SECONDS = 0.003  # from an answer to the next request of its client


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def handler(index: Any, requests: Any, waited_ms: Any) -> list[None]:
    return [None for _ in requests]


class Simulated:
    """One worker, and clients of whom each asks again after each answer. Time is simulated."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now, self._loop = 0.0, loop
        self._queue = FairQueue(lambda: self.now)
        self._arrivals: list[tuple[float, int, str, str]] = []
        self.answers: Counter[tuple[str, str]] = Counter()

    def client(self, index: str, name: str, at_once: int = 1) -> None:
        for _ in range(at_once):
            self._arrive(index, name)

    def _arrive(self, index: str, name: str) -> None:
        heapq.heappush(self._arrivals, (self.now + RETURN_SECONDS, len(self._arrivals), index, name))

    def run(self, until: float) -> None:
        while self.now < until:
            while self._arrivals and self._arrivals[0][0] <= self.now:
                _, _, index, name = heapq.heappop(self._arrivals)
                work: Work[None] = Work(index, handler, kind=index, client=name)
                self._queue.add(Waiting(work, self._loop.create_future(), float("inf")))
            patience = self._queue.expected()
            if patience > 0 or not len(self._queue):
                later = self._arrivals[0][0] if self._arrivals else until
                self.now = min(later, self.now + patience) if patience > 0 else later
                continue
            self._compute(self._queue.take(lambda _: BATCH))

    def _compute(self, batch: list[Waiting]) -> None:
        (index,) = {str(waiting.work.index) for waiting in batch}
        seconds = PASS_SECONDS[index](len(batch))
        self.now += seconds
        self._queue.charge(batch, seconds)
        for waiting in batch:
            self.answers[index, waiting.work.client] += 1
            self._arrive(index, waiting.work.client)

    def rate(self, index: str) -> float:
        return sum(count for (of, _), count in self.answers.items() if of == index) / self.now


@pytest.mark.parametrize("many_keys", [False, True])
def test_two_clients_of_a_small_index_keep_a_third_of_their_rate(
    loop: asyncio.AbstractEventLoop, many_keys: bool
) -> None:
    lone, beside, others = Simulated(loop), Simulated(loop), Simulated(loop)
    for simulated in (lone, beside):
        simulated.client("small", "a")
        simulated.client("small", "b")
    for simulated in (beside, others):
        for number in range(32):
            simulated.client("large", f"{number}" if many_keys else "all")
    for simulated in (lone, beside, others):
        simulated.run(60)
    assert beside.rate("small") >= lone.rate("small") / 3
    assert beside.rate("large") >= others.rate("large") / 3


def test_a_client_with_many_requests_leaves_the_others_their_share(loop: asyncio.AbstractEventLoop) -> None:
    simulated = Simulated(loop)
    simulated.client("large", "greedy", at_once=200)
    for name in "abc":
        simulated.client("large", name)
    simulated.run(60)
    lone = Simulated(loop)
    lone.client("large", "a")
    lone.run(60)
    passes = 60 / PASS_SECONDS["large"](BATCH)
    for name in "abc":  # they are in each pass for which they are there in time
        assert simulated.answers["large", name] >= 0.45 * passes
    assert simulated.rate("large") >= 0.95 * BATCH / PASS_SECONDS["large"](BATCH)  # batches are full all the same


def test_who_was_idle_saves_up_no_time(loop: asyncio.AbstractEventLoop) -> None:
    simulated = Simulated(loop)
    simulated.client("small", "early")
    simulated.run(30)
    for number in range(32):
        simulated.client("large", f"{number}")
    before = simulated.answers["small", "early"]
    simulated.run(60)
    assert simulated.rate("large") > 0
    assert simulated.answers["small", "early"] - before > before / 4


def test_names_of_indexes_that_callers_make_up_are_forgotten(loop: asyncio.AbstractEventLoop) -> None:
    queue = FairQueue()
    for number in range(5_000):
        waiting = Waiting(Work(f"{number}", handler), loop.create_future(), float("inf"))
        queue.add(waiting)
        queue.charge(queue.take(lambda _: BATCH), 0.01)
    assert len(queue._indexes) < 2_000
    assert len(queue) == 0


SLOW_TO_OPEN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
while not Path({flag!r}).exists():
    time.sleep(0.05)
from digits_task import TASK
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_while_an_index_is_opened_others_are_answered(digits_index: DigitsRun, tmp_path: Path, processes: int) -> None:
    late = Path(shutil.copytree(digits_index.index.parent, tmp_path / "run")) / "index"
    flag, task = tmp_path / "go on", tmp_path / "slow_task.py"
    task.write_text(SLOW_TO_OPEN.format(tests=str(Path(digits_task.__file__).parent), flag=str(flag)))
    hosted = [Hosted("first", digits_index.index, digits_index.task), Hosted("late", late, f"{task}:TASK")]
    app = create_service(hosted, Settings(processes=processes))
    with serving_when_ready(app) as url, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.post, f"{url}/influence", json={"query_rows": [0], "index": "late"}, timeout=600)
        wait_until(lambda: app.state.engine.waiting == 1)
        for _ in range(5):
            assert httpx.post(f"{url}/influence", json={"query_rows": [0]}, timeout=600).status_code == 200
        assert not waits.done()
        assert [index["loaded"] for index in httpx.get(f"{url}/indexes").json()["indexes"]] == [True, False]
        flag.touch()
        assert waits.result().status_code == 200
        wait_until(lambda: httpx.get(f"{url}/indexes").json()["indexes"][1]["loaded"])


def test_a_key_has_no_more_in_flight_than_it_may(digits_index: DigitsRun, tmp_path: Path) -> None:
    keys = [add_key(tmp_path / "keys", name, [Scope.query]) for name in ("a", "b")]
    settings = Settings(processes=0, api_key_file=tmp_path / "keys", max_in_flight=2)
    app = create_service([Hosted("a", digits_index.index, digits_index.task)], settings)

    def ask(key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{url}/influence", json={"query_rows": [0]}, headers=headers, timeout=600)

    release = threading.Event()
    with serving_when_ready(app) as url, ThreadPoolExecutor(3) as pool:
        app.state.engine.workers[0].thread.submit(release.wait, 120)
        waiting = [pool.submit(ask, keys[0]) for _ in range(2)]
        wait_until(lambda: app.state.engine.waiting + app.state.engine.computing == 2)
        refused = ask(keys[0])
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:gradtrace:problem:busy")
        assert refused.headers["retry-after"]
        other = pool.submit(ask, keys[1])
        wait_until(lambda: app.state.engine.waiting + app.state.engine.computing == 3)
        release.set()
        assert [response.result().status_code for response in (*waiting, other)] == [200] * 3
        assert ask(keys[0]).status_code == 200
