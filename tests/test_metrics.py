"""/metrics, Server-Timing, the log and traces, of a real service over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging.config
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from asgi_correlation_id import correlation_id
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from conftest import DigitsRun, keep_job, wait_until
from gradtrace import MissingLibraryError
from gradtrace_client import AsyncClient, Client, InfluenceAnswer
from gradtrace_client.schemas import Timing
from gradtrace_client.service_schemas import Job
from gradtrace_service import app as app_module
from gradtrace_service.app import create_app, create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.ops.logs import log_config
from gradtrace_service.ops.timings import server_timing, stages, tracer_provider
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings


@pytest.fixture
def url(digits_index: DigitsRun) -> Iterator[str]:
    """A service that nobody else asks, which is ready."""
    with serving(create_app(digits_index.open(), Settings(batch_wait_ms=100.0))) as address:
        wait_ready(address)
        yield address


def wait_ready(url: str) -> None:
    wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)


def samples(url: str) -> dict[tuple[str, ...], float]:
    """Values by (name, label values in the order of their names)."""
    text = httpx.get(f"{url}/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_those_of_the_answers(url: str) -> None:
    before = samples(url)
    with Client(url, retries=0) as client:
        answers = [client.influence(query_rows=[row, row + 1], k=3, rescore=row == 4) for row in range(5)]
        client.self_influence(k=3)
    after = samples(url)
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    assert gained["gradtrace_requests_total", "/influence", "POST", "200"] == 5
    assert gained["gradtrace_requests_total", "/self-influence", "GET", "200"] == 1
    assert gained["gradtrace_request_seconds_count", "/influence"] == 5
    assert gained["gradtrace_queue_seconds_count",] == 6
    results = [result for answer in answers for result in answer.results]
    assert gained["gradtrace_rows_searched_total",] == sum(result.rows_searched for result in results)
    assert gained["gradtrace_rows_touched_total",] == sum(result.rows_touched for result in results)
    for stage in ("gradient", "render", "rescore"):
        seconds = sum(getattr(answer.timing_ms, stage) for answer in answers) / 1000.0
        own = gained["gradtrace_stage_seconds_sum", stage]
        assert own == pytest.approx(seconds) if stage != "render" else own >= seconds
    assert gained["gradtrace_stage_seconds_count", "gradient"] == 5
    assert gained["gradtrace_stage_seconds_count", "rescore"] == 1
    assert gained["gradtrace_batch_queries_sum",] == 11
    assert after["gradtrace_index_generation", "index"] == answers[0].index.generation
    assert after["gradtrace_queue_length",] == 0
    assert after["process_resident_memory_bytes",] > 1e6


def test_requests_that_were_answered_together_count_as_one_pass(url: str) -> None:
    before = samples(url)

    async def ask() -> list[InfluenceAnswer]:
        async with AsyncClient(url, retries=0) as client:
            return await asyncio.gather(*(client.influence(query_rows=[row], k=2) for row in range(8)))

    answers = asyncio.run(ask())
    gained = {key: value - before.get(key, 0.0) for key, value in samples(url).items()}
    assert {answer.timing_ms.batch for answer in answers} == {8}
    assert gained["gradtrace_batch_queries_count",] == 1
    assert gained["gradtrace_batch_queries_sum",] == 8
    assert gained["gradtrace_queue_seconds_count",] == 8
    for answer in answers:  # they waited for the batch to fill, and total is what the parts sum up to at least
        timing = answer.timing_ms
        assert timing.queue >= 50
        assert timing.total >= sum(stages(timing).values()) - 1e-6
    assert gained["gradtrace_queue_seconds_sum",] == pytest.approx(
        sum(answer.timing_ms.queue for answer in answers) / 1000.0, abs=0.05 * 8
    )


def test_errors_count_by_kind_and_addresses_by_template(url: str) -> None:
    httpx.post(f"{url}/influence", json={"query_rows": [0], "method": "magic"})
    for row in range(3):
        httpx.get(f"{url}/examples/train/{10**6 + row}")
        httpx.get(f"{url}/nothing/{row}")
    httpx.request("PROPFIND", f"{url}/index")
    found = samples(url)
    assert found["gradtrace_requests_total", "/index", "(other)", "405"] == 1
    assert found["gradtrace_errors_total", "invalid-request"] == 1
    assert found["gradtrace_errors_total", "not-found"] == 6
    assert found["gradtrace_requests_total", "/examples/{split}/{row}", "GET", "404"] == 3
    assert found["gradtrace_requests_total", "(none)", "GET", "404"] == 3


def test_a_caller_who_went_away_counts_as_499(url: str) -> None:
    body = b'{"query_rows": [0]}'
    head = (
        f"POST /influence HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(head.encode() + body)
    gone = ("gradtrace_requests_total", "/influence", "POST", "499")
    wait_until(lambda: samples(url).get(gone) == 1)


def test_applications_of_one_process_count_for_themselves(url: str, digits_index: DigitsRun) -> None:
    with serving(create_app(digits_index.open())) as other:
        wait_ready(other)
        httpx.get(f"{other}/index")
        assert samples(other)["gradtrace_requests_total", "/index", "GET", "200"] == 1
    assert ("gradtrace_requests_total", "/index", "GET", "200") not in samples(url)


def test_jobs_and_published_generations(digits_index: DigitsRun, tmp_path: Path) -> None:
    index = Path(shutil.copytree(digits_index.index, tmp_path / "index"))
    now = datetime.now(timezone.utc)
    kept = Job(
        id="0123456789abcdef", index="here", operation="update", state="failed", progress=0.5, generation=1, created=now
    )
    keep_job(index, kept)
    hosted = [Hosted("here", index, digits_index.task, [digits_index.checkpoints])]
    with serving(create_service(hosted, Settings(processes=0))) as url:
        wait_ready(url)
        for named in ({}, {"index": "here"}):
            httpx.post(f"{url}/influence", json={"query_rows": [0], **named})
        found = samples(url)
        assert found["gradtrace_index_generation", "here"] == 1
        assert found["gradtrace_index_published_generation", "here"] == 1
        jobs = {state: found["gradtrace_jobs", state] for state in ("running", "succeeded", "failed", "interrupted")}
        assert jobs == {"running": 0, "succeeded": 0, "failed": 1, "interrupted": 0}
        (index / "manifest.json").unlink()
        assert ("gradtrace_index_published_generation", "here") not in samples(url)


def test_server_timing_says_what_the_answer_says(url: str) -> None:
    response = httpx.post(f"{url}/influence", json={"query_rows": [0]})
    timing = Timing(**response.json()["timing_ms"])
    assert response.headers["server-timing"] == server_timing(timing)
    times = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
    assert set(times) >= {"queue", "gradient", "search", "render", "total"}
    assert float(times["gradient"]) == pytest.approx(timing.gradient, abs=1e-3)


def test_request_ids_are_the_caller_s_or_new(url: str) -> None:
    assert httpx.get(f"{url}/healthz", headers={"X-Request-ID": "trace-7:a"}).headers["x-request-id"] == "trace-7:a"
    own = [httpx.get(f"{url}/nothing").headers["x-request-id"] for _ in range(2)]
    assert own[0] != own[1]
    for forged in ("a b", "x" * 129, '{"level":"error"}'):
        assert httpx.get(f"{url}/healthz", headers={"X-Request-ID": forged}).headers["x-request-id"] != forged


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("uvicorn", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def logged(capsys: pytest.CaptureFixture[str], format_name: str, digits_index: DigitsRun) -> list[str]:
    logging.config.dictConfig(log_config(Settings(log_format=format_name, log_level="info")))
    with serving(create_app(digits_index.open())) as url:
        httpx.post(f"{url}/influence", json={"query_rows": [0]}, headers={"X-Request-ID": "mine"})
        httpx.get(f"{url}/examples/train/99999", headers={"X-Request-ID": "other"})
    return capsys.readouterr().err.splitlines()


@pytest.mark.usefixtures("restored_logging")
def test_the_log_in_json(capsys: pytest.CaptureFixture[str], digits_index: DigitsRun) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in logged(capsys, "json", digits_index)]
    by_id = {line["request_id"]: line for line in lines if line["logger"] == "gradtrace_service.http.access_log"}
    assert by_id["mine"]["path"] == "/influence"
    assert (by_id["mine"]["method"], by_id["mine"]["status"], by_id["mine"]["problem"]) == ("POST", 200, None)
    assert by_id["mine"]["milliseconds"] > 0
    assert (by_id["other"]["status"], by_id["other"]["problem"]) == (404, "urn:gradtrace:problem:not-found")
    assert all({"timestamp", "level", "logger", "message", "request_id"} <= set(line) for line in lines)


@pytest.mark.usefixtures("restored_logging")
def test_the_log_as_text(capsys: pytest.CaptureFixture[str], digits_index: DigitsRun) -> None:
    lines = logged(capsys, "text", digits_index)
    assert any(
        re.search(r"INFO \[mine\] gradtrace_service.http.access_log: POST '/influence' 200 \d+\.\d ms", one)
        for one in lines
    )


@pytest.mark.usefixtures("restored_logging")
def test_a_failure_is_logged_with_the_id_of_its_request(
    capsys: pytest.CaptureFixture[str], digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = digits_index.open()
    logging.config.dictConfig(log_config(Settings(log_format="json")))
    with serving(create_app(index)) as url:
        wait_ready(url)
        monkeypatch.setattr(index, "self_influence", lambda **_: 1 / 0)
        assert httpx.get(f"{url}/self-influence", headers={"X-Request-ID": "unlucky"}).status_code == 500
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    failures = [line for line in lines if "ZeroDivisionError" in line.get("exc_info", "")]
    assert [line["request_id"] for line in failures] == ["unlucky"]
    assert correlation_id.get() is None


def test_a_request_is_one_trace_with_its_stages(digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(app_module, "tracer_provider", lambda endpoint: provider)
    trace = f"{0xABCDEF:032x}"
    with serving(create_app(digits_index.open())) as url:
        body = {"query_rows": [0]}
        answer = httpx.post(f"{url}/influence", json=body, headers={"traceparent": f"00-{trace}-{7:016x}-01"})
    timing = Timing(**answer.json()["timing_ms"])
    by_name: dict[str, ReadableSpan] = {span.name: span for span in spans.get_finished_spans()}
    request = by_name.pop("POST /influence")
    assert {f"{span.context.trace_id:032x}" for span in (request, *by_name.values())} == {trace}
    assert set(stages(timing)) == set(by_name)
    for stage, span in by_name.items():
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(getattr(timing, stage), abs=0.01)
    assert all(np.diff([span.start_time for span in sorted(by_name.values(), key=lambda span: span.end_time)]) >= 0)


def test_traces_are_sent_where_a_setting_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracer_provider(None) is None
    by_setting = tracer_provider("http://127.0.0.1:9/")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    by_environment = tracer_provider(None)
    for provider in (by_setting, by_environment):
        assert provider is not None
        assert provider.resource.attributes["service.name"] == "gradtrace"
        provider.shutdown()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'gradtrace\[otel\]'"):
        tracer_provider(None)
