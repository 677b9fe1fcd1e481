"""Hostile requests, drawn from the grammar of benchmarks/hostile_requests.py, beside an honest client."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import pytest
from benchmarks.hostile_requests import Hostile, drawn, statuses

from conftest import DigitsRun, serving_when_ready
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

REQUESTS = range(60)
MOST_ANSWERED = 20_000  # bytes of a refusal's body


@pytest.fixture(scope="module")
def service(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.URL]:
    hosted = [Hosted("digits", digits_index.index, digits_index.task, [digits_index.checkpoints])]
    with serving_when_ready(create_service(hosted, Settings())) as url:
        yield httpx.URL(url)


def test_whatever_is_sent_is_answered_or_closed_and_honest_answers_stay(
    service: httpx.URL, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Client(str(service), retries=0) as honest:
        usual = [hit.row for hit in honest.influence(query_rows=[1], k=5).results[0].proponents]
        for number in REQUESTS:
            hostile = drawn(number)
            answered = statuses(service.host, service.port or 0, hostile, patience=2.0)
            assert max(answered, default=0) < 500, (number, hostile.kind, answered)
            assert [hit.row for hit in honest.influence(query_rows=[1], k=5).results[0].proponents] == usual
    tracebacks = [record.getMessage() for record in caplog.records if record.exc_info]
    assert tracebacks == []


def test_the_grammar_draws_the_same_requests_of_every_kind_again() -> None:
    drawings: list[Hostile] = [drawn(number) for number in REQUESTS]
    assert drawings == [drawn(number) for number in REQUESTS]
    assert len({hostile.kind for hostile in drawings}) > 10
