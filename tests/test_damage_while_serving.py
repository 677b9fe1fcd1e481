"""Files of an open index that are damaged in place: every answer is right, or 503. Real writes under real clients."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace import Index
from gradtrace.store.index_files import FileStamp, VerifiedFiles, check_files, written_to
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client.request_schemas import SelfInfluenceRequest
from gradtrace_service.answers.rows import self_influence
from gradtrace_service.app import create_app, create_service
from gradtrace_service.engine.work import IndexUnavailableError, Work, answer
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.indexes.open_index import OpenIndex
from gradtrace_service.settings import Settings

UNAVAILABLE = "urn:gradtrace:problem:index-unavailable"
Answer = str | tuple[tuple[int, float], ...]
BODY = {"query_rows": [4], "k": 20, "method": "influence"}


@pytest.fixture
def run(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """A copy that a test may damage."""
    shutil.copytree(digits_index.index.parent, tmp_path / "run")
    return DigitsRun(tmp_path / "run" / "checkpoints", tmp_path / "run" / "index", digits_index.task)


class Clients:
    """Ask all the while. answers: as `answered` returns them"""

    def __init__(self, url: str, count: int) -> None:
        self.answers: Counter[Answer] = Counter()
        self._url, self._lock, self._ended = url, threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._asking = [self._pool.submit(self._ask) for _ in range(count)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as http:
            while not self._ended.is_set():
                answer = answered(http.post("/influence", json=BODY))
                with self._lock:
                    self.answers[answer] += 1

    def end(self) -> Counter[Answer]:
        self._ended.set()
        for asking in self._asking:
            asking.result()
        self._pool.shutdown()
        return self.answers


def answered(response: httpx.Response) -> Answer:
    """The rows and scores of a result, or the problem's type."""
    document = response.json()
    if response.status_code != 200:
        return str(document["type"])
    (result,) = document["results"]
    return tuple((hit["row"], hit["score"]) for end in ("proponents", "opponents") for hit in result[end])


def is_right(answer: Answer, right: Answer) -> bool:
    """Up to the rounding of another batch."""
    return not isinstance(answer, str) and np.allclose(answer, np.array(right), rtol=1e-4, atol=0)


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    for _ in range(2):
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
        if _ == 0:
            yield


@contextmanager
def truncated(path: Path, size: int) -> Iterator[None]:
    content = path.read_bytes()
    os.truncate(path, size)
    yield
    with path.open("r+b") as file:
        file.seek(size)
        file.write(content[size:])


def damage(run: DigitsRun, url: str, flips: int, truncations: int) -> None:
    """Damage random files, one at a time, and repair each once the service has noticed."""
    names = [entry.path for entry in read_manifest(run.index).files()]
    draw = random.Random(0)
    kinds = ["flip"] * flips + ["truncate"] * truncations
    draw.shuffle(kinds)
    for kind in kinds:
        path = run.index / draw.choice(names)
        place = draw.randrange(path.stat().st_size)
        with flipped(path, place, draw.randrange(8)) if kind == "flip" else truncated(path, place):
            wait_until(lambda: httpx.get(f"{url}/readyz", timeout=600).status_code == 503)
        wait_until(lambda: httpx.get(f"{url}/readyz", timeout=600).status_code == 200)


def test_under_clients_every_answer_is_right_or_503(run: DigitsRun) -> None:
    flips, truncations = (int(count) for count in os.environ.get("GRADTRACE_TEST_DAMAGE", "8 6").split())
    with serving_when_ready(create_service([Hosted("a", run.index, run.task)], Settings())) as url:
        right = answered(httpx.post(f"{url}/influence", json=BODY, timeout=600))
        clients = Clients(url, 4)
        try:
            damage(run, url, flips, truncations)
        finally:
            answers = clients.end()
        assert [answer for answer in answers if answer != UNAVAILABLE and not is_right(answer, right)] == []
        assert answers[UNAVAILABLE] > 0
        assert len(answers) > 1
        assert is_right(answered(httpx.post(f"{url}/influence", json=BODY, timeout=600)), right)


def test_readiness_and_a_gauge_tell_of_damage_without_any_query(run: DigitsRun, digits_index: DigitsRun) -> None:
    hosted = [Hosted("a", run.index, run.task), Hosted("b", digits_index.index, digits_index.task)]
    shard = run.index / read_manifest(run.index).shards[0].rows.path
    with serving_when_ready(create_service(hosted, Settings())) as url, httpx.Client(base_url=url, timeout=600) as http:
        assert 'gradtrace_index_unavailable{index="a"} 0.0' in http.get("/metrics").text
        with flipped(shard, 100, 3):
            wait_until(lambda: 'gradtrace_index_unavailable{index="a"} 1.0' in http.get("/metrics").text)
            assert answered(http.post("/influence", json=BODY)) == UNAVAILABLE
            assert http.get("/readyz").status_code == 200  # of the other index
            assert http.post("/influence", json=BODY | {"index": "b"}).status_code == 200
        wait_until(lambda: 'gradtrace_index_unavailable{index="a"} 0.0' in http.get("/metrics").text)
        assert http.post("/influence", json=BODY).status_code == 200
        assert [index["loaded"] for index in http.get("/indexes").json()["indexes"]] == [True, True]


def test_an_index_that_was_opened_by_the_caller_is_watched_until_it_was_written_to(run: DigitsRun) -> None:
    """Scores from damaged rows may be kept in the open index: it doesn't answer after a repair either."""
    shard = run.index / read_manifest(run.index).shards[0].rows.path
    with serving_when_ready(create_app(run.open())) as url:
        right = answered(httpx.post(f"{url}/influence", json=BODY))
        with flipped(shard, 100, 3):
            assert answered(httpx.post(f"{url}/influence", json=BODY)) == UNAVAILABLE
            assert httpx.get(f"{url}/readyz").status_code == 503
        refused = httpx.post(f"{url}/influence", json=BODY)
        assert answered(refused) == UNAVAILABLE
        assert "open" in refused.json()["detail"]
        assert httpx.get(f"{url}/readyz").status_code == 503
    with serving_when_ready(create_app(run.open())) as url:
        assert answered(httpx.post(f"{url}/influence", json=BODY)) == right


def test_scores_computed_while_a_file_was_damaged_are_never_answered(run: DigitsRun) -> None:
    shard = run.index / read_manifest(run.index).shards[0].rows.path
    indexes, request = OpenIndex(run.open()), SelfInfluenceRequest(k=3, examples=False)

    def while_damaged(index: Index, requests: Sequence[SelfInfluenceRequest], waited_ms: Sequence[float]) -> Any:
        with flipped(shard, 100, 3):
            return self_influence(index, requests, waited_ms)

    for handler in (while_damaged, self_influence):
        (outcome,) = answer(indexes, [Work(None, handler, request)], [0.0])
        assert isinstance(outcome, IndexUnavailableError)


def test_deleted_and_replaced_files_are_answered_from_the_open_ones(run: DigitsRun) -> None:
    shard = run.index / read_manifest(run.index).shards[0].rows.path
    with serving_when_ready(create_app(run.open())) as url:
        right = answered(httpx.post(f"{url}/influence", json=BODY))
        damaged = shard.with_suffix(".other")
        damaged.write_bytes(bytes(shard.stat().st_size))
        damaged.replace(shard)
        assert answered(httpx.post(f"{url}/influence", json=BODY)) == right
        shutil.rmtree(run.index)
        assert answered(httpx.post(f"{url}/influence", json=BODY)) == right


def test_only_files_that_are_new_or_changed_are_read_again(run: DigitsRun) -> None:
    manifest = read_manifest(run.index)
    verified: VerifiedFiles = {}
    assert check_files(run.index, manifest, True, verified) == []
    assert set(verified) == set(manifest.files())
    assert written_to(run.index, verified) == []
    entry = manifest.shards[0].rows
    path = run.index / entry.path
    before = path.stat()
    with flipped(path, 7, 1):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had not been written to
        assert written_to(run.index, verified) == [entry.path]
        (problem,) = check_files(run.index, manifest, True, verified)
        assert entry.path in problem
    assert check_files(run.index, manifest, True, verified) == []
    os.link(path, run.index / "a copy by a hard link")
    assert written_to(run.index, verified) == []
    verified[entry] = FileStamp.of(path)
    path.chmod(0)  # where it is read all the same, it is unchanged
    path.chmod(0o644)
    assert check_files(run.index, manifest, True, verified) == []
