"""Requests of more queries than a pass answers: others have their turn in between, and the answer is one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from conftest import DigitsRun
from digits_task import TASK
from gradtrace import Index
from gradtrace_client.group_and_pair_schemas import GroupsAnswer
from gradtrace_client.schemas import InfluenceAnswer
from gradtrace_service.answers.passes import joined, outdated
from gradtrace_service.app import create_app
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Work
from gradtrace_service.engine.workers import ThreadWorker
from gradtrace_service.indexes.open_index import OpenIndex
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

ROWS = [*range(20, 43)]
SETTINGS = Settings(batch_size=8, max_in_flight=1)


def posted(digits_index: DigitsRun, body: dict[str, Any], path: str = "/influence") -> httpx.Response:
    with serving(create_app(digits_index.open(), SETTINGS)) as url:
        return httpx.post(url + path, json=body, timeout=120)


def test_many_queries_are_answered_in_their_order_by_passes_of_batch_size(digits_index: DigitsRun) -> None:
    answer = InfluenceAnswer.model_validate_json(posted(digits_index, {"query_rows": ROWS, "k": 7}).content)
    assert [result.query.row for result in answer.results] == ROWS
    assert answer.timing_ms.batch == 8
    expected = digits_index.open().influence([TASK.query[row] for row in ROWS], k=7)
    for result, alone in zip(answer.results, expected, strict=True):
        assert [hit.row for hit in result.proponents] == [hit.row for hit in alone.proponents]
        np.testing.assert_allclose(
            [hit.score for hit in result.opponents], [hit.score for hit in alone.opponents], rtol=1e-5
        )


def test_rescored_answers_of_several_passes_give_the_time_of_a_row(digits_index: DigitsRun) -> None:
    body = {"query_rows": ROWS[:10], "k": 2, "rescore": True}
    answer = InfluenceAnswer.model_validate_json(posted(digits_index, body).content)
    rows, timing = sum(result.rows_rescored for result in answer.results), answer.timing_ms
    assert timing.rescore_per_row is not None
    np.testing.assert_allclose(timing.rescore_per_row * rows, timing.rescore)


def test_groups_of_many_queries_are_those_of_each(digits_index: DigitsRun) -> None:
    together = GroupsAnswer.model_validate_json(posted(digits_index, {"query_rows": ROWS}, "/influence/groups").content)
    alone = digits_index.open().group_influence([TASK.query[row] for row in ROWS], by="label")
    assert [result.query.row for result in together.results] == ROWS
    for result, groups in zip(together.results, alone, strict=True):
        assert [group.group for group in result.groups] == [group.group for group in groups]


def test_the_mean_of_many_queries_is_one_result(digits_index: DigitsRun) -> None:
    answer = InfluenceAnswer.model_validate_json(
        posted(digits_index, {"query_rows": ROWS, "aggregate": "mean"}).content
    )
    assert [result.query.rows for result in answer.results] == [ROWS]


def test_a_refusal_names_the_field_as_the_request_has_it(digits_index: DigitsRun) -> None:
    blank = {"image": [[0] * 8] * 8, "label": 3}
    response = posted(digits_index, {"examples": [blank] * 18 + [{"image": "@@@"}]})
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["errors"]] == ["examples[18]"]


def handler(index: Index, requests: Sequence[int], waited_ms: Sequence[float]) -> list[int]:
    return list(requests)


async def in_turn(engine: Engine, works: Sequence[Work[int]]) -> list[int]:
    with engine.accept(works[0]) as accepted:
        return [await accepted.answer(work) for work in works]


def test_others_are_answered_between_the_passes_of_a_request(index: Index) -> None:
    order: list[str] = []
    engine = Engine(
        [ThreadWorker(OpenIndex(index))],
        Settings(max_in_flight=1),
        lambda works, *_: order.extend(work.client for work in works),
    )

    async def asked() -> list[list[int]]:
        large = [Work(None, handler, number, client="large") for number in range(3)]
        small = [Work(None, handler, 9, client="small")]
        return await asyncio.gather(in_turn(engine, large), in_turn(engine, small))

    assert asyncio.run(asked()) == [[0, 1, 2], [9]]
    assert order == ["large", "small", "large", "large"]
    engine.close()


def test_a_service_that_drains_answers_all_passes_of_an_accepted_request(index: Index) -> None:
    engine = Engine([ThreadWorker(OpenIndex(index))])

    async def drained() -> list[int]:
        asked = asyncio.ensure_future(in_turn(engine, [Work(None, handler, number) for number in range(3)]))
        await asyncio.sleep(0)  # it is accepted
        await engine.drain()
        assert asked.done()
        return asked.result()

    assert asyncio.run(drained()) == [0, 1, 2]
    engine.close()


def test_passes_of_an_earlier_generation_are_asked_again(digits_index: DigitsRun) -> None:
    answer = InfluenceAnswer.model_validate_json(posted(digits_index, {"query_rows": [0]}).content)
    newer = answer.model_copy(update={"index": answer.index.model_copy(update={"generation": 7})})
    assert outdated([answer, newer, answer]) == [0, 2]
    assert outdated([newer, newer]) == []
    assert len(joined([newer, newer]).results) == 2
