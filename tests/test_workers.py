"""Callers that leave, and workers that hang, are slow, or leave processes behind: the engine with real processes, whose
indexes are made here."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conftest import DigitsRun, mostly_long, serving_when_ready, wait_until
from gradtrace_service.app import create_app, create_service
from gradtrace_service.engine import processes, retries
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.fair_queue import Waiting
from gradtrace_service.engine.processes import ProcessWorker
from gradtrace_service.engine.work import IndexUnavailableError, Opening, Work
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

LOG: dict[str, Any] = {"version": 1, "disable_existing_loggers": False}


class NoIndexes:
    """Those of a worker whose handlers need none."""

    def get(self, name: str | None) -> Any:
        return None

    def check(self, name: str | None, index: Any) -> None:
        pass

    def open_default(self) -> None:
        pass

    def states(self) -> dict[str, bool | None]:
        return {}

    def openings(self) -> dict[str, Opening]:
        return {}


class StoppedAtFirst(NoIndexes):
    """The first process that makes them is stopped before they are there."""

    def __init__(self, marker: Path) -> None:
        if not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)


def pid(index: Any, requests: Sequence[Any], waited_ms: Sequence[float]) -> list[int]:
    return [os.getpid()] * len(requests)


def when_there(index: Any, requests: Sequence[Path], waited_ms: Sequence[float]) -> list[int]:
    """Answers when all the files that are asked for exist."""
    wait_until(lambda: all(path.exists() for path in requests))
    return pid(index, requests, waited_ms)


def with_engine(
    use: Callable[[Engine], Coroutine[Any, Any, None]], processes: int = 1, limit: int | None = None, **settings: Any
) -> None:
    """Run `use` on an engine of worker processes."""

    async def run() -> None:
        workers = [ProcessWorker(NoIndexes, LOG, limit) for _ in range(processes)]
        engine = Engine(workers, Settings(**settings))
        try:
            await use(engine)
        finally:
            for worker in workers:
                worker.end()
            engine.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


class Body:
    """A request that can be watched."""


def test_callers_that_left_leave_nothing_in_the_queue_of_a_busy_worker(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        busy = asyncio.ensure_future(engine.run(Work(None, when_there, tmp_path / "go")))
        await until(lambda: engine.computing == 1)
        bodies: weakref.WeakSet[Body] = weakref.WeakSet()
        for _ in range(500):
            body = Body()
            bodies.add(body)
            left = asyncio.ensure_future(engine.run(Work(None, pid, body)))
            del body
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.wait([left])
            del left
        await until(lambda: len(bodies) <= 1)  # asyncio may still hold the last one
        (tmp_path / "go").touch()
        await busy

    with_engine(use, max_in_flight=2)


def test_workers_that_were_given_work_meanwhile_are_not_asked_for_their_states(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        await asyncio.gather(*(engine.run(Work(None, pid)) for _ in engine.workers))  # both are started
        await until(lambda: len(engine._idle) == 2)
        processes = [psutil.Process(worker.pid) for worker in engine.workers]  # type: ignore[attr-defined]
        for process in processes:
            process.suspend()
        looking = asyncio.ensure_future(engine.refresh())
        await asyncio.sleep(0)
        busy = asyncio.ensure_future(engine.run(Work(None, when_there, tmp_path / "go")))  # on the one not asked yet
        await until(lambda: engine.computing == 1)
        for process in processes:
            process.resume()
        await looking
        (tmp_path / "go").touch()
        assert await busy in [process.pid for process in processes]

    with_engine(use, processes=2)


def test_an_idle_worker_that_hangs_is_replaced() -> None:
    async def use(engine: Engine) -> None:
        before = await engine.run(Work(None, pid))
        os.kill(before, signal.SIGSTOP)
        engine.settings = Settings(deadline_seconds=1)  # it is given two seconds
        looking = asyncio.ensure_future(engine.refresh())
        await asyncio.sleep(0)
        engine.settings = Settings(deadline_seconds=300)
        assert await engine.run(Work(None, pid)) != before
        await looking

    with_engine(use, deadline_seconds=300)


def test_workers_are_looked_at_again_after_a_look_that_failed(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    async def fails(engine: Engine) -> None:
        looks.append(len(looks))
        raise RuntimeError("not this time")

    monkeypatch.setattr(Engine, "refresh", fails)
    with serving_when_ready(create_app(digits_index.open())):
        wait_until(lambda: len(looks) > 1)
    assert "not this time" in caplog.text


def forks(index: Any, requests: Sequence[tuple[Path, str]], waited_ms: Sequence[float]) -> list[int]:
    """Leave a process behind that holds whatever this one has open, and then hang or end."""
    ((path, deed),) = requests
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    path.write_text(str(child))
    if deed == "hangs":
        time.sleep(600)
    os._exit(1)


@pytest.mark.parametrize("deed", mostly_long(["hangs", "ends"], "hangs"))
def test_a_worker_is_replaced_while_a_process_lives_that_it_forked(tmp_path: Path, deed: str) -> None:
    async def use(engine: Engine) -> None:
        before = await engine.run(Work(None, pid))
        asked = asyncio.ensure_future(engine.run(Work(None, forks, (tmp_path / "child", deed))))
        await until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
        child = int((tmp_path / "child").read_text())
        if deed == "hangs":
            engine.workers[0].end()
        asked.cancel()  # else it is tried again
        await asyncio.wait([asked])
        assert await engine.run(Work(None, pid)) != before
        await until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)

    with_engine(use, deadline_seconds=120)


def slow_together(index: Any, requests: Sequence[float], waited_ms: Sequence[float]) -> list[int]:
    """Takes the seconds that are asked for; several together never end."""
    time.sleep(requests[0] if len(requests) == 1 else 600)
    return [len(requests)] * len(requests)


def test_a_request_that_needs_longer_than_its_part_is_answered_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_BATCH_SHARE", 0.01)  # two seconds, the least

    async def use(engine: Engine) -> None:
        held = asyncio.ensure_future(engine.run(Work(None, when_there, tmp_path / "go")))
        await until(lambda: engine.computing == 1)
        works = [Work(None, slow_together, seconds, kind="slow") for seconds in [4.0] + [0.0] * 99]
        asked = [asyncio.ensure_future(engine.run(work)) for work in works]
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        await held
        assert await asyncio.gather(*asked) == [1] * 100

    with_engine(use, deadline_seconds=100, batch_size=100)  # a hundredth of which is less than four seconds


def waiting_ones(sizes: Sequence[int]) -> list[Waiting]:
    answer: Any = None
    return [Waiting(Work(None, pid, size=size, kind="a"), answer, time.perf_counter() + 12) for size in sizes]


def test_a_slow_batch_leaves_each_request_several_times_what_it_took_there() -> None:
    batch = waiting_ones([1] * 8)
    retries.leave_alone(batch, late=True, took=8.0)
    for waiting in batch:
        assert waiting.patience == pytest.approx(3.0)  # of the twelve that are left
    few = waiting_ones([1] * 3)
    retries.leave_alone(few, late=True, took=12.0)
    assert sum(waiting.patience or 0 for waiting in few) == pytest.approx(12, abs=0.5)


def test_batches_of_a_slow_kind_are_smaller_until_they_are_fast() -> None:
    sizes, batch = retries.BatchSizes(16), waiting_ones([1] * 16)
    sizes.note(batch, 12.0, 12.0)
    assert sizes.of(batch[0].work) == 8
    assert sizes.of(Work(None, pid, kind="b")) == 16
    sizes.note(batch[:8], 4.0, 12.0)  # twice as many would take too long
    assert sizes.of(batch[0].work) == 8
    sizes.note(batch[:2], 0.1, 12.0)  # says nothing about more
    assert sizes.of(batch[0].work) == 8
    sizes.note(batch[:8], 1.0, 12.0)
    assert sizes.of(batch[0].work) == 16


def test_the_first_queries_of_the_service_are_not_counted_as_a_clients(digits_index: DigitsRun) -> None:
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving_when_ready(create_service(hosted, Settings(processes=2, max_in_flight=1, queue_size=1))) as url:
        assert httpx.get(f"{url}/index").status_code == 200


def test_requests_for_the_default_index_wait_together_and_made_up_names_do_not_wait(digits_index: DigitsRun) -> None:
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    app, release = create_service(hosted, Settings(processes=0)), threading.Event()
    with serving_when_ready(app) as url, ThreadPoolExecutor(3) as pool:
        engine = app.state.engine
        engine.workers[0].thread.submit(release.wait, 120)
        try:
            pool.submit(httpx.get, f"{url}/index", timeout=120)
            wait_until(lambda: engine.computing == 1)
            bodies: list[dict[str, Any]] = [{"query_rows": [0]}, {"query_rows": [1], "index": "digits"}]
            asked = [pool.submit(httpx.post, f"{url}/influence", json=body, timeout=120) for body in bodies]
            wait_until(lambda: engine.waiting == 2)
            refused = httpx.post(f"{url}/influence", json={"query_rows": [0], "index": "made up"}, timeout=120)
            assert refused.status_code == 422
            assert {waiting.work.index for waiting in engine._queue} == {"digits"}
        finally:
            release.set()
        assert [response.result().status_code for response in asked] == [200, 200]


def test_a_worker_whose_indexes_need_more_than_its_memory_limit_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    async def use(engine: Engine) -> None:
        assert len({await engine.run(Work(None, pid)) for _ in range(4)}) == 1
        before = await engine.run(Work(None, grows))
        assert await engine.run(Work(None, pid)) != before

    with_engine(use, limit=1)
    assert caplog.text.count("after its first answer") == 2
    assert caplog.text.count("it is replaced") == 1


_held: list[bytes] = []


def grows(index: Any, requests: Sequence[Any], waited_ms: Sequence[float]) -> list[int]:
    """Hold twice as much memory as now."""
    _held.append(b"x" * psutil.Process().memory_info().rss)
    return pid(index, requests, waited_ms)


def test_a_process_that_is_stopped_while_it_starts_is_ended_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "_START_SECONDS", 5.0)
    worker = ProcessWorker(partial(StoppedAtFirst, tmp_path / "pid"), LOG)
    try:
        worker.start()
        assert worker.ready
        stopped = int((tmp_path / "pid").read_text())
        assert worker.pid != stopped
        wait_until(lambda: not psutil.pid_exists(stopped))
        assert "it hangs, or was stopped" in caplog.text
    finally:
        worker.close(wait=False)


def test_a_process_that_is_stopped_while_the_service_starts_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_START_SECONDS", 1.0)
    worker = ProcessWorker(partial(StoppedAtFirst, tmp_path / "pid"), LOG)
    try:
        with pytest.raises(IndexUnavailableError, match="it hangs, or was stopped"):
            worker.open_default()
    finally:
        worker.close(wait=False)


def test_waits_between_starts_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(processes, "_START_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(processes, "_LONGEST_WAIT_SECONDS", 0.04)
    waits: list[float] = []
    worker = ProcessWorker(os.abort, LOG)  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "_closed", Closing(waits))
    worker.start()
    assert waits == [0.01, 0.02, 0.04, 0.04]
    worker.close(wait=False)


class Closing(threading.Event):
    """Notes for how long is waited for it, and is set after four times."""

    def __init__(self, waits: list[float]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.append(timeout or 0.0)
        if len(self._waits) == 4:
            self.set()
        return self.is_set()
