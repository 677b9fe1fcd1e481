"""An index whose opening takes long, or hangs, is told; one that hangs is given up, and others are answered."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace_service.app import create_service
from gradtrace_service.engine import slow_openings
from gradtrace_service.engine.slow_openings import HUNG_SECONDS, SLOW_SECONDS, SlowOpenings
from gradtrace_service.engine.work import Opening
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

TASK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
while not Path({here!r}, "go on").exists():
    time.sleep(0.05)
from digits_task import TASK
"""
HUNG = 10.0  # in place of ten minutes: many times what opening the index of digits takes


@pytest.fixture(params=[1, pytest.param(0, marks=pytest.mark.long)], ids=["process", "thread"])
def service(
    digits_index: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """Of the index of digits, and of the same one with a task that hangs when it is loaded."""
    monkeypatch.setattr(slow_openings, "SLOW_SECONDS", 1.0)
    monkeypatch.setattr(slow_openings, "HUNG_SECONDS", HUNG)
    source = tmp_path / "hanging_task.py"
    source.write_text(TASK.format(tests=str(Path(__file__).parent), here=str(tmp_path)))
    hosted = [
        Hosted(name, digits_index.index, task, [digits_index.checkpoints])
        for name, task in {"a": digits_index.task, "hangs": f"{source}:TASK"}.items()
    ]
    with serving_when_ready(create_service(hosted, Settings(processes=request.param, deadline_seconds=300))) as url:
        yield url
        (tmp_path / "go on").touch()


def asked(url: str, index: str) -> httpx.Response:
    return httpx.post(f"{url}/influence", json={"index": index, "query_rows": [0], "k": 2}, timeout=300)


def test_an_index_whose_opening_hangs_is_given_up_and_tried_again(
    service: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(asked, service, "hangs")
        wait_until(lambda: opening_seconds(service)["hangs"] > 1)
        assert opening_seconds(service)["a"] == 0
        assert gauge(service, 'gradtrace_index_opening_seconds{index="hangs"}') > 1
        assert asked(service, "a").status_code == 200
        refused = hanging.result()
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:gradtrace:problem:index-unavailable")
    assert re.search(r"index hangs has been opening for \d+ s \(at hanging_task.py, line \d: `", caplog.text)
    assert re.search(r"index hangs is given up, and tried again in 10 s: .* \(at hanging_task.py, line \d", caplog.text)
    assert gauge(service, 'gradtrace_index_unavailable{index="hangs"}') == 1
    wait_until(lambda: asked(service, "a").status_code == 200)
    (tmp_path / "go on").touch()
    wait_until(lambda: asked(service, "hangs").status_code == 200)
    wait_until(lambda: gauge(service, 'gradtrace_index_unavailable{index="hangs"}') == 0)


def opening_seconds(url: str) -> dict[str, float]:
    indexes = httpx.get(f"{url}/indexes", timeout=60).json()["indexes"]
    return {index["name"]: index["opening_seconds"] or 0.0 for index in indexes}


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def test_what_is_verified_file_by_file_is_only_slow(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    slow, verifying = SlowOpenings(), Opening(20 * HUNG_SECONDS, 5.0)
    assert slow.look({"a": Opening(SLOW_SECONDS - 1, 0.0)}, {"a": False}) == []
    assert caplog.text == ""
    for _ in range(2):
        assert slow.look({"a": verifying}, {"a": False}) == []
    assert len(caplog.records) == 1


def test_an_index_that_answers_from_its_old_generation_is_not_given_up() -> None:
    assert SlowOpenings().look({"a": Opening(2 * HUNG_SECONDS, 2 * HUNG_SECONDS)}, {"a": True}) == []


def test_an_index_is_given_up_for_twice_as_long_each_time_until_it_opens() -> None:
    now, hung = 0.0, {"a": Opening(2 * HUNG_SECONDS, 2 * HUNG_SECONDS)}
    slow = SlowOpenings(lambda: now)
    for wait in (1, 2, 4):
        assert slow.look(hung, {"a": False}) == ["a"]
        slow.give_up("a", hung["a"])
        now += wait * HUNG_SECONDS - 1
        assert slow.refuses("a")
        assert slow.look(hung, {"a": False}) == []
        now += 2
        assert not slow.refuses("a")
    assert slow.given_up() == ["a"]
    assert slow.look({}, {"a": True}) == []
    assert slow.given_up() == []
