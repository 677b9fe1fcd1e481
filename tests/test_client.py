"""The SDK's own part, against real HTTP over loopback. What it gets from the real service is in test_service.py."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, TypedDict

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

import gradtrace_client
from gradtrace_client import (
    AsyncClient,
    AuthenticationError,
    BusyError,
    Client,
    ClientError,
    DeadlineError,
    ForbiddenError,
    GroupsOptions,
    InfluenceAnswer,
    InfluenceOptions,
    InvalidRequestError,
    NotFoundError,
    PairsOptions,
    ProtocolError,
    QuestionOptions,
    SelfInfluenceAnswer,
    SelfInfluenceOptions,
    ServiceError,
    UnreachableError,
)
from gradtrace_client.request_schemas import MAX_K, InfluenceRequest, Question, SelfInfluenceRequest
from gradtrace_client.service_schemas import VERSION_HEADER

pytestmark = pytest.mark.unit

INFO = {
    "generation": 3,
    "task": "Digits",
    "rows": 40,
    "checkpoints": [{"name": "a.pt", "step": 10, "learning_rate": 0.1}],
    "dimensions": 64,
    "basis": "spectral",
    "precision": "float16",
}
DETAILS = INFO | {"methods": ["tracin"], "class_names": None, "query_rows": 5, "conventions": {}}
PIXEL = "data:image/png;base64,AAAA"


def hit(row: int, score: float, **changed: Any) -> dict[str, Any]:
    known = {"label": 3, "label_name": "three", "prediction": 5, "prediction_name": "<five>", "loss": 2.5}
    rest = {"correct": False, "parts": {"a.pt": score}, "example": {"image": PIXEL}}
    return {"row": row, "score": score, **known, **rest, **changed}


def answer() -> dict[str, Any]:
    query = {"split": "query", "row": 1, "target": "loss", "label": 3, "label_name": None, "prediction": 3}
    query |= {"prediction_name": None, "loss": 0.5, "example": {"text": "<script>alert(1)</script>"}}
    result = {"query": query, "proponents": [hit(7, 2.0), hit(8, 1.0)], "opponents": [hit(9, -1.5)]}
    result |= {"rows_searched": 40, "rows_touched": 12}
    timing = dict.fromkeys(("queue", "gradient", "search", "render", "total"), 1.0)
    return {"index": INFO, "method": "tracin", "convention": "Positive: good", "exact": True} | {
        "results": [result],
        "timing_ms": timing,
    }


@dataclass
class Script:
    """A server on loopback that gives these answers one after the other, and remembers what it was asked."""

    answers: list[tuple[int, dict[str, str], bytes] | None]  # None: hang up without an answer
    url: str = ""
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def serving(*answers: tuple[int, dict[str, str], Any] | None) -> Iterator[Script]:
    encoded = [a and (a[0], a[1], a[2] if isinstance(a[2], bytes) else json.dumps(a[2]).encode()) for a in answers]
    script = Script(encoded)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            script.seen.append((self.command, self.path, dict(self.headers), body))
            planned = script.answers[min(len(script.seen), len(script.answers)) - 1]
            if planned is None:
                self.connection.close()
                self.close_connection = True
                return
            status, headers, content = planned
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        script.url = f"http://127.0.0.1:{server.server_port}"
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def problem(status: int, **more: Any) -> tuple[int, dict[str, str], Any]:
    document = {"type": "about:blank", "title": "No", "status": status, "detail": "because", **more}
    return status, {"Content-Type": "application/problem+json"}, document


def test_the_client_needs_none_of_the_other_rooms_and_no_torch() -> None:
    code = (
        "import sys, gradtrace_client\n"
        "bad = {'torch', 'numpy', 'pandas', 'gradtrace', 'gradtrace_indexer', 'gradtrace_service'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_synchronous_client_is_up_to_date() -> None:
    script = runpy.run_path(str(Path(gradtrace_client.__file__).parents[1] / "generate_sync_client.py"))
    for path, text in script["sync_modules"]().items():
        assert path.read_text() == text, f"run `make client` and commit {path.name}"


def test_the_options_are_the_fields_of_a_question_and_each_is_explained() -> None:
    assert list(QuestionOptions.__annotations__) == list(Question.model_fields)
    bases = dict.fromkeys((InfluenceOptions, PairsOptions, SelfInfluenceOptions), QuestionOptions)
    for options, base in {QuestionOptions: TypedDict, GroupsOptions: PairsOptions, **bases}.items():
        inherited = getattr(base, "__annotations__", {}).keys()
        explained = re.findall(r"^(\w+): ", inspect.getdoc(options) or "", re.MULTILINE)
        assert set(explained) == options.__annotations__.keys() - inherited
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(InvalidRequestError, match="dampening: there is no such"),
    ):
        client.influence(query_rows=[1], dampening=0.1)


def test_what_influence_sends() -> None:
    with serving((200, {}, answer())) as server, Client(server.url, api_key="secret") as client:
        client.influence({"text": "hello"}, k=3, filter={"labels": [1]}, checkpoints=["a.pt"], include=[])
    verb, path, headers, body = server.seen[0]
    assert (verb, path) == ("POST", "/influence")
    assert headers["Authorization"] == "Bearer secret"
    sent = InfluenceRequest.model_validate_json(body)
    assert sent == InfluenceRequest(
        example={"text": "hello"}, k=3, filter={"labels": [1]}, checkpoints=["a.pt"], include=frozenset()
    )


def test_options_are_sent_as_they_were_given() -> None:
    where = {"loss": {"min": 1.0}, "prediction": {"in": [3, "cat"]}}
    with serving((200, {}, answer())) as server, Client(server.url) as client:
        client.influence(query_rows=[1, 2], filter={"where": where}, rescore=True, aggregate="mean", include=["layers"])
        client.influence(query_rows=[1])
    sent, plain = (json.loads(body) for _, _, _, body in server.seen)
    assert sent == {
        "query_rows": [1, 2],
        "filter": {"where": where},
        "rescore": True,
        "aggregate": "mean",
        "include": ["layers"],
    }
    assert plain == {"query_rows": [1]}


def test_what_self_influence_sends() -> None:
    page = {"index": INFO, "method": "cosine", "convention": "", "rows_total": 1, "results": [hit(1, 2.0, parts=None)]}
    page["timing_ms"] = answer()["timing_ms"]
    with serving((200, {}, page)) as server, Client(server.url) as client:
        found = client.self_influence(k=2, offset=4, labels=[1, 2], method="cosine", examples=False)
    assert server.seen[0][1] == "/self-influence?method=cosine&k=2&offset=4&labels=1.0&labels=2.0&examples=false"
    assert isinstance(found, SelfInfluenceAnswer)
    assert list(found.to_pandas()["row"]) == [1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again(status: int) -> None:
    busy = (status, {"Retry-After": "0"}, {})
    with serving(busy, busy, (200, {}, DETAILS)) as server, Client(server.url) as client:
        assert client.index().generation == 3
    assert len(server.seen) == 3


def test_a_lost_connection_is_tried_again() -> None:
    with serving(None, (200, {}, DETAILS)) as server, Client(server.url) as client:
        assert client.index().rows == 40
    assert len(server.seen) == 2


def test_a_change_is_not_asked_for_twice_unless_the_first_was_refused() -> None:
    with serving(None, (200, {}, {})) as server, Client(server.url) as client, pytest.raises(UnreachableError):
        client.reindex()
    assert len(server.seen) == 1
    started = {"id": "ab", "index": "a", "operation": "update", "state": "running", "progress": 0.0, "generation": 1}
    started |= {"created": "2026-01-01T00:00:00Z"}
    with serving((503, {"Retry-After": "0"}, {}), (202, {}, started)) as server, Client(server.url) as client:
        assert client.reindex("a", roll_back_to=1).id == "ab"
    assert json.loads(server.seen[1][3]) == {"index": "a", "roll_back_to": 1}


def test_an_absent_service_is_named() -> None:
    with serving((200, {}, DETAILS)) as server:
        url = server.url
    with pytest.raises(UnreachableError, match="gradtrace serve"), Client(url, retries=1) as client:
        client.index()


def test_waits_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with serving(problem(503)) as server, Client(server.url, retries=20) as client, pytest.raises(BusyError):
        client.index()
    assert len(waits) in (7, 8)  # the eighth wait is 25.6 to 38.4 s, and 30 s are the limit
    assert all(0.2 * 2**attempt <= wait <= 0.3 * 2**attempt for attempt, wait in enumerate(waits))


def in_29_seconds() -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=29), usegmt=True)


@pytest.mark.parametrize("header", [lambda: "29", in_29_seconds], ids=["seconds", "date"])
def test_retry_after_is_honoured(header: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with serving((503, {"Retry-After": header()}, {}), (200, {}, DETAILS)) as server, Client(server.url) as client:
        client.index()
    (wait,) = waits
    assert 1 < wait < 29.4  # time passes until a date is read; the backoff alone is 0.2 to 0.3 s
    assert header() != "29" or wait >= 29.2


def test_a_wait_beyond_patience_is_handed_to_the_caller() -> None:
    answer_busy = problem(429)
    answer_busy[1]["Retry-After"] = "3600"
    with (
        serving(answer_busy) as server,
        Client(server.url) as client,
        pytest.raises(BusyError) as caught,
    ):
        client.index()
    assert caught.value.retry_after == 3600
    assert len(server.seen) == 1


def test_a_job_is_followed_where_its_events_are_not_understood() -> None:
    job = {"id": "ab", "index": "a", "operation": "update", "progress": 0.5, "generation": 1}
    running, ended = (job | {"state": state, "created": "2026-01-01T00:00:00Z"} for state in ("running", "succeeded"))
    events = f": ping\n\nevent: x\ndata: {json.dumps(running)}\n\ndata: {{}}\n\n".encode()
    with (
        serving((200, {"Content-Type": "text/event-stream"}, events), (200, {}, ended)) as server,
        Client(server.url) as client,
    ):
        assert [state.state for state in client.follow("ab")] == ["running", "succeeded"]
    assert [path for _, path, _, _ in server.seen] == ["/jobs/ab/events", "/jobs/ab"]


def test_an_address_without_a_scheme_is_told() -> None:
    with pytest.raises(ClientError, match="http://HOST:PORT"):
        Client("127.0.0.1:8000")


def test_retries_end() -> None:
    with serving(problem(503)) as server, Client(server.url, retries=2) as client, pytest.raises(BusyError):
        client.index()
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (403, ForbiddenError),
        (404, NotFoundError),
        (405, InvalidRequestError),
        (413, InvalidRequestError),
        (422, InvalidRequestError),
        (500, ServiceError),
        (504, DeadlineError),
    ],
)
def test_a_refusal_is_raised_at_once_as_its_kind(status: int, kind: type[Exception]) -> None:
    refusal = problem(status, errors=[{"field": "k", "detail": "too large"}])
    with serving(refusal) as server, Client(server.url) as client, pytest.raises(kind, match="because\n  k: too large"):
        client.index()
    assert len(server.seen) == 1


def test_another_server_is_told_from_the_service() -> None:
    with serving((200, {}, {"hello": "world"})) as server, Client(server.url) as client, pytest.raises(ProtocolError):
        client.index()
    with (
        serving((502, {}, "bad gateway")) as server,
        Client(server.url) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.index()
    assert "502 Bad Gateway" in str(caught.value)


def test_an_answer_that_cannot_be_decompressed_is_of_another_server() -> None:
    with (
        serving((200, {"Content-Encoding": "gzip"}, DETAILS)) as server,
        Client(server.url) as client,
        pytest.raises(ProtocolError, match="cannot be decompressed"),
    ):
        client.index()


@pytest.mark.parametrize("key", ["gradtrace_a\nb", "gradtrace_é"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ClientError, match="characters that no header may hold") as caught:
        Client("http://127.0.0.1:1", key)
    assert "gradtrace_" not in str(caught.value)


def test_a_key_may_come_with_the_end_of_its_line() -> None:
    with serving((200, {}, DETAILS)) as server, Client(server.url, "gradtrace_a\n") as client:
        client.index()
    assert server.seen[0][2]["Authorization"] == "Bearer gradtrace_a"


def test_a_service_of_another_major_version_is_refused_and_both_are_named() -> None:
    ours = version("gradtrace-client")
    major = ours.partition(".")[0]
    for theirs in (f"{major}.999.0", ours):
        with serving((200, {VERSION_HEADER: theirs}, DETAILS)) as server, Client(server.url) as client:
            assert client.index().rows == 40
    for status in (200, 404):  # a refusal, too, may come from not understanding each other
        named = rf"77\.1\.0.*{re.escape(ours)}.*'gradtrace-client==77\.\*'"
        with (
            serving((status, {VERSION_HEADER: "77.1.0"}, DETAILS)) as server,
            Client(server.url) as client,
            pytest.raises(ProtocolError, match=named),
        ):
            client.index()


def test_a_slow_answer_is_not_asked_for_twice() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2) as client,
    ):
        with pytest.raises(UnreachableError, match="ReadTimeout"):
            client.index()
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # no second connection
            silent.accept()


def test_the_async_client_does_the_same() -> None:
    async def ask(url: str) -> tuple[int, list[int]]:
        async with AsyncClient(url) as client:
            details, found = await asyncio.gather(client.index(), client.influence(query_rows=[1]))
            return details.rows, [hit.row for hit in found.results[0].proponents]

    async def refused(url: str) -> None:
        async with AsyncClient(url, retries=0) as client:
            await client.examples("train", 9)

    page = answer() | DETAILS
    with serving((429, {"Retry-After": "0"}, {}), None, (200, {}, page)) as server:
        assert asyncio.run(ask(server.url)) == (40, [7, 8])
    with serving(problem(404)) as server, pytest.raises(NotFoundError):
        asyncio.run(refused(server.url))


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, ""),
        ({"example": {}, "query_rows": [1]}, ""),
        ({"query_rows": []}, "query_rows"),
        ({"query_rows": [0, -1]}, "query_rows[1]"),
        ({"query_rows": [True]}, "query_rows[0]"),
        ({"query_rows": [0], "k": 0}, "k"),
        ({"query_rows": [0], "k": MAX_K + 1}, "k"),
        ({"query_rows": [0], "checkpoints": []}, "checkpoints"),
        ({"query_rows": [0], "weights": "mine"}, "weights"),
        ({"query_rows": [0], "target": "accuracy"}, "target"),
        ({"query_rows": [0], "include": ["everything"]}, "include"),
        ({"query_rows": [0], "filter": {"colour": "red"}}, "filter.colour"),
        ({"query_rows": [0], "filter": {"rows": []}}, "filter.rows"),
        ({"query_rows": [0], "filter": {"labels": [math.nan]}}, "filter.labels[0]"),
        ({"query_rows": [0], "filter": {"labels": [10**400]}}, "filter.labels[0]"),
        ({"query_rows": [0], "filter": {"where": {}}}, "filter.where"),
        ({"query_rows": [0], "filter": {"where": {"loss": {}}}}, "filter.where.loss"),
        ({"query_rows": [0], "filter": {"where": {"loss": {"in_": [1]}}}}, "filter.where.loss.in_"),
        ({"query_rows": [0], "aggregate": "sum"}, "aggregate"),
        ({"query_rows": [0, 1, 2], "k": MAX_K // 2, "rescore": True}, ""),
    ],
)
def test_a_request_that_does_not_fit_is_not_sent(fields: dict[str, Any], where: str) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(InvalidRequestError) as caught:
        client.influence(**fields)
    assert caught.value.errors[0].field.startswith(where)
    assert caught.value.status == 422


def test_what_may_be_rescored_at_once() -> None:
    for enough in ({"query_rows": [0, 1]}, {"query_rows": [0, 1, 2], "aggregate": "mean"}, {"example": {}}):
        assert InfluenceRequest(**enough, k=MAX_K // 2, rescore=True).rescore


def test_nan_is_sent_as_what_is_not_known() -> None:
    with serving((200, {}, answer())) as server, Client(server.url) as client:
        client.influence({"features": np.array([1.0, np.nan])})
    assert json.loads(server.seen[0][3]) == {"example": {"features": [1.0, None]}}


def test_what_is_not_json_is_not_sent() -> None:
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(InvalidRequestError, match="JSON values"):
            client.influence({"image": object()})
        with pytest.raises(InvalidRequestError, match=r"convert\('RGB'\)"):
            client.influence({"image": Image.new("CMYK", (2, 2))})
        with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
            client.influence({"image": Path("nowhere.png")})


@pytest.mark.parametrize("schema", [InfluenceRequest, SelfInfluenceRequest])
def test_a_request_refuses_unknown_fields(schema: type[InfluenceRequest]) -> None:
    with pytest.raises(ValidationError, match="colour"):
        schema.model_validate({"query_rows": [1], "colour": True})


def test_an_answer_of_a_newer_service_still_parses() -> None:
    InfluenceAnswer.model_validate(answer() | {"news": 1})


def test_frames_have_a_line_a_hit() -> None:
    table = InfluenceAnswer.model_validate(answer()).to_pandas()
    assert list(table["side"]) == ["proponent", "proponent", "opponent"]
    assert list(table["rank"]) == [1, 2, 1]
    assert list(table["row"]) == [7, 8, 9]
    assert list(table["part:a.pt"]) == [2.0, 1.0, -1.5]
    assert "example" not in table.columns


def test_layers_and_percentiles_are_shown_where_they_are() -> None:
    found = answer()
    found["results"][0]["proponents"][0] |= {"layers": {"fc": 1.5, "out": 0.5}, "percentile": 99.5}
    typed = InfluenceAnswer.model_validate(found)
    table = typed.to_pandas()
    assert table.loc[0, ["percentile", "layer:fc", "layer:out"]].tolist() == [99.5, 1.5, 0.5]
    assert table["percentile"].isna().tolist() == [False, True, True]
    page = typed._repr_html_()
    assert page.count("<th>percentile</th>") == 1
    assert "99.50 %" in page
    assert "percentile" not in InfluenceAnswer.model_validate(answer())._repr_html_()


def test_html_names_the_mean_of_queries() -> None:
    found = answer()
    found["results"][0]["query"] |= {"count": 12, "row": None, "rows": list(range(12)), "example": None}
    assert "Mean of 12 queries" in InfluenceAnswer.model_validate(found)._repr_html_()


def test_html_shows_thumbnails_and_escapes_everything_else() -> None:
    page = InfluenceAnswer.model_validate(answer())._repr_html_()
    assert f'<img src="{PIXEL}"' in page
    assert "&lt;five&gt;" in page
    assert "<script>" not in page
    hostile = answer()
    hostile["results"][0]["proponents"][0]["example"] = {"image": 'https://elsewhere/x.png" onerror="alert(1)'}
    assert "elsewhere" not in InfluenceAnswer.model_validate(hostile)._repr_html_()
