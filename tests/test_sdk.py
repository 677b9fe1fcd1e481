"""What the SDK does beyond one exchange, with the real service over HTTP: jobs, streams, inputs, displays."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import digits_task
import gradtrace
import gradtrace_client
from conftest import DigitsRun
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace_client import AsyncClient, Client, Influence, InvalidRequestError, Job, JobFailedError, NotFoundError
from gradtrace_client._progress_bar import progress_bar
from gradtrace_client.service_schemas import VERSION_HEADER
from gradtrace_indexer import build_index
from gradtrace_service.app import create_app, create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

TASK = digits_task.TASK
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def url(digits_index: DigitsRun) -> Iterator[str]:
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], Settings(processes=0))) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, retries=0) as connected:
        yield connected


@pytest.fixture
def behind(digits_index: DigitsRun, tmp_path: Path) -> Iterator[str]:
    """A service over an index that lacks the last of three checkpoints."""
    checkpoints = Path(shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints"))
    first = gradtrace.load_checkpoints(checkpoints)[:2]
    build_index(TASK, first, tmp_path / "index", dimensions=256, progress=False)
    with serving(
        create_service([Hosted("a", tmp_path / "index", digits_index.task)], Settings(processes=0))
    ) as address:
        yield address


class Route(httpx.HTTPTransport):
    """A connection that counts requests and, on the way to `/events`, is cut after so many chunks."""

    def __init__(self, cut_events_after: int | None = None) -> None:
        super().__init__()
        self.paths: list[str] = []
        self._cut = cut_events_after

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        response = super().handle_request(request)
        if request.url.path.endswith("/events") and self._cut is not None:
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _Cut(response.stream, self._cut)
        return response


class _Cut(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, after: int) -> None:
        self._stream, self._after = stream, after

    def __iter__(self) -> Iterator[bytes]:
        for number, chunk in enumerate(self._stream):
            if number == self._after:
                raise httpx.RemoteProtocolError("cut")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def test_a_job_is_followed_to_its_end_also_where_events_are_cut_off(behind: str) -> None:
    async def wait(started: Job) -> Job:
        async with AsyncClient(behind) as client:
            return await client.wait(started.id)

    def wait_by(route: Route, started: Job) -> Job:
        with Client(behind, transport=route) as client:
            return client.wait(started)

    routes = [Route(cut_events_after=chunks) for chunks in (0, 1)]
    with Client(behind) as client, ThreadPoolExecutor(3) as pool:
        started = client.reindex("a")
        waiting = [pool.submit(wait_by, route, started) for route in routes]
        waiting.append(pool.submit(asyncio.run, wait(started)))
        states = list(client.follow(started))
        last = states[-1]
        assert [state.state for state in states] == ["running"] * (len(states) - 1) + ["succeeded"]
        assert (last.id, last.generation, last.progress) == (started.id, 2, 1.0)
        assert [one.result() for one in waiting] == [last] * 3
        assert client.jobs().jobs == [client.job(started)] == [last]
        assert list(client.jobs().to_pandas()["state"]) == ["succeeded"]
    for route in routes:
        assert route.paths.count(f"/jobs/{started.id}/events") == 1
        assert route.paths.count(f"/jobs/{started.id}") >= 1


def test_the_examples_of_the_page_run_and_a_job_that_fails_is_raised(
    behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(TASK.normalise.inverse(TASK.query[3][0])[:, :, 0]).save("four.png")
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", (DOCS / "client.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code.replace("http://127.0.0.1:8000", behind), "docs/client.md", "exec"), names)
    assert len(names["table"]) == 10
    assert (names["job"].state, names["job"].generation) == ("succeeded", 2)
    assert len(names["suspects"]) == digits_task.load(slice(400))[1].tolist().count(3)
    names["patient"].close()
    with names["client"] as client:
        with pytest.raises(JobFailedError, match="keeps no generation 7") as caught:
            client.wait(client.reindex(roll_back_to=7))
        assert caught.value.job.state == "failed"
        with pytest.raises(NotFoundError, match="no job"):
            client.wait("none")


def test_the_page_describes_every_call_and_error() -> None:
    page = (DOCS / "client.md").read_text()
    calls = {name for name in dir(Client) if not name.startswith("_")}
    errors = {name for name in gradtrace_client.__all__ if name.endswith("Error")}
    assert [name for name in sorted(calls | errors) if not re.search(rf"`(client\.)?{name}\b", page)] == []


def job(progress: float, **more: Any) -> Job:
    known = {"id": "ab", "index": "<a>", "operation": "update", "state": "running", "generation": 1}
    return Job.model_validate({**known, "progress": progress, "created": "2026-01-01T00:00:00Z", **more})


def test_the_progress_bar_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))  # some library has imported it
    with progress_bar(True) as show:
        show(job(0.5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(True) as show:
        show(job(0.5))
    assert capsys.readouterr().err == f"\rupdate of <a> [{'#' * 15}{'.' * 15}]  50%, running\n"
    with progress_bar(False) as show:
        show(job(0.5))
    assert capsys.readouterr().err == ""


def test_the_indexes_of_a_service_are_listed_without_opening_them(digits_index: DigitsRun, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits_index.index, tmp_path / "copy"))
    shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints")
    hosted = [Hosted(name, path, digits_index.task) for name, path in (("one", digits_index.index), ("two", copy))]
    with serving(create_service(hosted, Settings(processes=0))) as url, Client(url) as client:
        known = {"generation": 1, "task": "ImageClassification", "rows": 400, "deleted": 0, "opening_seconds": None}
        first, second = client.indexes().indexes
        assert first.model_dump() == {"name": "one", "loaded": True, **known}
        assert second.model_dump() == {"name": "two", "loaded": False, **known}
        client.index("two")
        assert list(client.indexes().to_pandas()["loaded"]) == [True, True]
        (copy / MANIFEST_NAME).unlink()
        first, second = client.indexes().indexes
        assert (first.generation, second.generation, second.rows) == (1, None, None)
        assert "<td>two</td><td></td>" in client.indexes()._repr_html_()


def test_a_service_over_an_open_index_lists_that_one(digits_index: DigitsRun) -> None:
    with serving(create_app(digits_index.open())) as url, Client(url) as client:
        assert [(one.name, one.rows, one.loaded) for one in client.indexes().indexes] == [(None, 400, True)]
        with pytest.raises(NotFoundError):
            client.reindex()


@pytest.mark.parametrize("path", ["/index", "/nowhere", "/healthz", "/self-influence?k=0"])
def test_every_answer_tells_the_service_s_version(url: str, path: str) -> None:
    described = httpx.get(f"{url}/openapi.json").json()["info"]["version"]
    assert httpx.get(url + path).headers[VERSION_HEADER] == described


def test_images_may_be_given_as_they_are_at_hand(client: Client, tmp_path: Path) -> None:
    pixels = TASK.normalise.inverse(TASK.query[3][0])[:, :, 0]  # uint8 [8, 8]
    label = TASK.query[3][1]
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    (tmp_path / "digit.png").write_bytes(file.getvalue())
    forms = [pixels, torch.from_numpy(pixels), picture, tmp_path / "digit.png", file.getvalue(), list(pixels)]
    expected = client.influence(query_rows=[3]).results[0]
    answers = [client.influence({"image": form, "label": np.int64(label)}).results[0] for form in forms]
    answers += client.influence(examples=[{"image": form, "label": label} for form in forms]).results
    for found in answers:
        assert [hit.row for hit in found.proponents] == [hit.row for hit in expected.proponents]
        np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-4)
    taught = client.pairs([{"image": pixels, "label": label}], query_rows=np.array([3]))
    np.testing.assert_allclose(taught.scores, client.pairs([{"image": picture, "label": label}], query_rows=[3]).scores)


def scores(result: Influence) -> list[float]:
    return [hit.score for hit in [*result.proponents, *result.opponents]]


def test_a_text_is_never_taken_for_a_path(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(path)
    with pytest.raises(InvalidRequestError, match="base64"):
        client.influence({"image": str(path)})


def test_any_number_of_queries_is_asked_in_pages_that_are_taken_as_needed(url: str) -> None:
    taken = []

    def rows() -> Iterator[int]:
        for row in range(400):
            taken.append(row)
            yield row

    route = Route()
    with Client(url, transport=route) as client:
        stream = client.stream_influence(train_rows=rows(), k=4, include=[])
        first = next(stream)
        assert len(taken) == 128
        results = [first, *stream]
        assert route.paths == ["/influence"] * 4
        assert [result.query.row for result in results] == list(range(400))
        alone = client.influence(train_rows=[399], k=4, include=[]).results[0]
        np.testing.assert_allclose(scores(results[399]), scores(alone), rtol=1e-4)
        assert len(list(client.stream_influence(query_rows=range(7), page=3))) == 7
        assert route.paths == ["/influence"] * 8
        rescored = client.stream_influence(query_rows=range(3), k=500, rescore=True, include=[])
        assert len(list(rescored)) == 3  # as many at a time as one request may rescore
        assert list(client.stream_influence(examples=[])) == []


@pytest.mark.parametrize(
    "wrong", [{}, {"query_rows": [1], "train_rows": [1]}, {"query_rows": [1], "aggregate": "mean"}]
)
def test_a_stream_that_cannot_be_is_not_begun(client: Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        next(client.stream_influence(**wrong))


def test_self_influence_streams_every_row_once_in_order(client: Client) -> None:
    hits = list(client.stream_self_influence(page=150, examples=False))
    assert sorted(hit.row for hit in hits) == list(range(400))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[150:300] == client.self_influence(k=150, offset=150, examples=False).results
    assert {hit.label for hit in client.stream_self_influence(labels=[3, 5])} == {3, 5}


def test_the_async_client_streams_as_well(url: str) -> None:
    async def ask() -> tuple[list[int | None], int]:
        async with AsyncClient(url) as client:
            rows = [found.query.row async for found in client.stream_influence(query_rows=range(20), page=8)]
            return rows, len([hit async for hit in client.stream_self_influence(page=300)])

    assert asyncio.run(ask()) == (list(range(20)), 400)


def test_every_answer_shows_itself_in_a_notebook(client: Client) -> None:
    groups = client.groups(query_rows=[3, 4])
    assert groups._repr_html_().count("<table>") == 2
    assert "<td>seven</td>" in groups._repr_html_()
    pairs = client.pairs(train_rows=[1, 2], query_rows=[3])
    assert pairs._repr_html_().count("<th>") == 3
    assert f"{pairs.scores[0][1]:+.4g}" in pairs._repr_html_()
    assert client.self_influence(k=3)._repr_html_().count("<img ") == 3
    assert client.examples("train", 3)._repr_html_().count("<img ") == 1
    failed = job(0.25, state="failed", error="<disk> is full")
    assert '<progress value="0.250" max="1">' in failed._repr_html_()
    assert "&lt;a&gt;" in failed._repr_html_()
    assert "&lt;disk&gt; is full" in failed._repr_html_()
