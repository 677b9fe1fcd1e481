"""The service over real HTTP, on a real index; every figure is compared with the library's own or with brute force."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import digits_task
import gradtrace
from conftest import DigitsRun, serving_when_ready
from gradtrace import Index
from gradtrace.methods import METHODS
from gradtrace_client import AsyncClient, Client, Hit, InfluenceAnswer, InvalidRequestError, NotFoundError, ServiceError
from gradtrace_client.request_schemas import MAX_K, MAX_QUERIES
from gradtrace_client.service_schemas import Problem
from gradtrace_indexer import delete_rows
from gradtrace_service.answers.documents import convention
from gradtrace_service.app import create_app
from gradtrace_service.engine.engine import Engine, QueueFullError
from gradtrace_service.engine.work import Work, each_alone
from gradtrace_service.engine.workers import ThreadWorker
from gradtrace_service.indexes.open_index import OpenIndex
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

TASK = digits_task.TASK


def pixels(row: int) -> list[list[int]]:
    image = TASK.normalise.inverse(TASK.query[row][0])[:, :, 0]
    return [[int(value) for value in line] for line in image]


def rows(answer: InfluenceAnswer, end: str = "proponents") -> list[list[int]]:
    return [[hit.row for hit in getattr(result, end)] for result in answer.results]


@pytest.mark.parametrize("method", ["tracin", "graddot", "cosine"])
def test_both_ends_are_those_of_brute_force(client: Client, index: Index, method: str) -> None:
    answer = client.influence(query_rows=[0, 7, 31], k=12, method=method)
    scores = index.scores([TASK.query[row] for row in (0, 7, 31)], method=method)
    assert answer.exact
    for result, expected in zip(answer.results, scores, strict=True):
        for hits, order in ((result.proponents, np.argsort(-expected)), (result.opponents, np.argsort(expected))):
            found = [hit.score for hit in hits]
            np.testing.assert_allclose(found, expected[order[:12]], rtol=1e-4)
            # Rows whose scores differ by rounding alone may change places.
            np.testing.assert_allclose(expected[[hit.row for hit in hits]], found, rtol=1e-4)
            assert len({hit.row for hit in hits}) == 12


def test_a_step_on_a_proponent_lowers_the_query_s_loss(client: Client, digits_index: DigitsRun) -> None:
    """The sign that the convention states, by taking the step."""
    answer = client.influence(query_rows=[5], k=1, method="graddot")
    weights = gradtrace.load_checkpoints(digits_index.checkpoints)[-1].load()
    query = TASK.collate([TASK.query[5]])

    def loss_after_step_on(row: int | None) -> float:
        model = TASK.model()
        model.load_state_dict(weights)
        if row is not None:
            TASK.loss(model, TASK.collate([TASK.train[row]])).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
        return float(TASK.loss(model, query).detach())

    before = loss_after_step_on(None)
    assert loss_after_step_on(answer.results[0].proponents[0].row) < before
    assert loss_after_step_on(answer.results[0].opponents[0].row) > before
    assert "Positive: a proponent" in answer.convention


def test_a_hit_says_what_it_is(client: Client, index: Index) -> None:
    result = client.influence(query_rows=[3], k=2).results[0]
    for hit in result.proponents + result.opponents:
        image, label = TASK.train[hit.row]
        assert (hit.label, hit.label_name) == (label, digits_task.NAMES[label])
        assert hit.prediction == index.columns["prediction"][hit.row]
        assert hit.correct == (hit.prediction == label)
        assert hit.loss == pytest.approx(float(index.columns["loss"][hit.row]), rel=1e-6)
        assert hit.parts is not None
        assert sum(hit.parts.values()) == pytest.approx(hit.score, rel=1e-4)
        assert hit.example == TASK.render((image, label))
    query = result.query
    assert (query.split, query.row, query.target) == ("query", 3, "loss")
    assert query.label == TASK.query[3][1]
    assert query.example == TASK.render(TASK.query[3])


def test_an_image_asks_the_same_as_its_row(client: Client) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array(pixels(4), dtype=np.uint8)).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    label = TASK.query[4][1]
    by_row = client.influence(query_rows=[4])
    by_image = client.influence({"image": png, "label": label})
    by_list = client.influence({"image": pixels(4), "label": digits_task.NAMES[label]})
    assert rows(by_row) == rows(by_image) == rows(by_list)
    assert by_image.results[0].query.row is None


def test_without_a_label_the_prediction_is_explained(client: Client) -> None:
    silent = client.influence({"image": pixels(4)}).results[0]
    assert silent.query.label is None
    assert silent.query.target == "loss at the predicted label"
    said = client.influence({"image": pixels(4), "label": silent.query.prediction}).results[0]
    assert [hit.row for hit in silent.proponents] == [hit.row for hit in said.proponents]


def test_a_training_row_is_its_own_proponent_and_can_be_left_out(client: Client) -> None:
    assert rows(client.influence(train_rows=[11], k=3, method="cosine"))[0][0] == 11
    assert 11 not in rows(client.influence(train_rows=[11], k=400, filter={"exclude_rows": [11]}))[0]


def test_filters(client: Client, index: Index) -> None:
    asked = {"query_rows": [2], "k": 400}
    by_label = client.influence(**asked, filter={"labels": [3, 8]})
    both = [*by_label.results[0].proponents, *by_label.results[0].opponents]
    assert {hit.label for hit in both} == {3, 8}
    assert by_label.results[0].rows_searched == int(np.isin(index.columns["label"], [3, 8]).sum())
    right = client.influence(**asked, filter={"correct_only": True, "rows": list(range(50))}).results[0]
    assert {hit.row for hit in [*right.proponents, *right.opponents]} == {
        row for row in range(50) if index.columns["prediction"][row] == TASK.train[row][1]
    }


def test_checkpoints_and_weights_are_chosen(client: Client, index: Index) -> None:
    names = [entry.name for entry in client.index().checkpoints]
    answer = client.influence(query_rows=[0], k=5, checkpoints=names[1:2], weights="equal")
    scores = index.scores([TASK.query[0]], checkpoints=names[1:2], weights="equal")[0]
    assert rows(answer)[0] == np.argsort(-scores)[:5].tolist()
    assert list(answer.results[0].proponents[0].parts or {}) == names[1:2]
    assert "learning rate" not in answer.convention


def test_include_leaves_out_what_is_not_wanted(client: Client) -> None:
    lean = client.influence(query_rows=[0], include=[]).results[0]
    assert lean.query.example is None
    assert all(hit.parts is None and hit.example is None for hit in lean.proponents + lean.opponents)
    half = client.influence(query_rows=[0], include=["parts"]).results[0].proponents[0]
    assert half.parts is not None
    assert half.example is None


def hits(answer: InfluenceAnswer) -> list[Hit]:
    return [hit for result in answer.results for hit in (*result.proponents, *result.opponents)]


def test_filters_on_columns_and_by_class_names(client: Client, index: Index) -> None:
    asked = {"query_rows": [2], "k": 400}
    named = client.influence(**asked, filter={"labels": ["three", 8]})
    assert rows(named) == rows(client.influence(**asked, filter={"labels": [3, 8]}))
    where = {"loss": {"min": 0.1, "max": 1.0}, "prediction": {"in": ["five", 3]}, "correct": {"in": [True]}}
    found = client.influence(**asked, filter={"where": where}).results[0]
    columns = index.columns
    kept = (columns["loss"] >= 0.1) & (columns["loss"] <= 1) & np.isin(columns["prediction"], [3, 5])
    hits = [*found.proponents, *found.opponents]
    assert sorted(hit.row for hit in hits) == np.flatnonzero(kept & columns["correct"]).tolist()


def test_rescored_answers_are_those_of_the_library_and_tell_their_cost(client: Client, index: Index) -> None:
    answer = client.influence(query_rows=[2, 9], k=6, rescore=True, method="cosine")
    expected = index.influence([TASK.query[2], TASK.query[9]], k=6, rescore=True, method="cosine")
    assert answer.rescored
    assert "full gradients" in answer.convention
    assert rows(answer) == [[hit.row for hit in result.proponents] for result in expected]
    assert [result.rows_rescored for result in answer.results] == [result.rows_rescored for result in expected]
    timing = answer.timing_ms
    assert timing.rescore_per_row is not None
    assert timing.rescore_per_row * sum(r.rows_rescored for r in answer.results) == pytest.approx(timing.rescore)
    plain = client.influence(query_rows=[2], k=6)
    assert (plain.rescored, plain.timing_ms.rescore, plain.timing_ms.rescore_per_row) == (False, 0, None)
    assert "compressed coordinates" in plain.convention


def test_the_mean_of_queries_says_of_which(client: Client, index: Index) -> None:
    answer = client.influence(query_rows=[2, 9, 4], k=6, aggregate="mean")
    mean = index.scores([TASK.query[row] for row in (2, 9, 4)]).mean(0)
    assert rows(answer) == [np.argsort(-mean)[:6].tolist()]
    query = answer.results[0].query
    assert (query.count, query.rows, query.row, query.split, query.example) == (3, [2, 9, 4], None, "query", None)
    sent = client.influence(examples=[{"image": pixels(row)} for row in (2, 9)], aggregate="mean").results[0].query
    assert (sent.count, sent.rows, sent.split) == (2, None, None)


def test_layers_and_percentiles_are_included_where_asked_for(client: Client, index: Index) -> None:
    answer = client.influence(query_rows=[3], k=5, include=["layers", "percentiles"])
    scores = index.scores([TASK.query[3]])[0]
    for hit in hits(answer):
        assert set(hit.layers or {}) == {"1", "3"}
        assert sum((hit.layers or {}).values()) == pytest.approx(hit.score, rel=1e-4)
        assert hit.percentile == pytest.approx(100 * np.mean(scores < scores[hit.row]))
        assert hit.parts is None
    distribution = answer.results[0].distribution
    assert distribution is not None
    assert distribution.quantiles["50"] == pytest.approx(np.median(scores), rel=1e-4)
    assert answer.timing_ms.percentiles > 0
    plain = client.influence(query_rows=[3], k=5)
    assert all(hit.layers is None and hit.percentile is None for hit in hits(plain))
    assert plain.results[0].distribution is None


def test_timings_add_up(client: Client) -> None:
    timing = client.influence(query_rows=[0, 1], rescore=True, include=["percentiles"]).timing_ms
    parts = timing.queue + timing.gradient + timing.search + timing.rescore + timing.percentiles + timing.render
    assert timing.gradient > 0
    assert timing.search > 0
    assert 0 < parts <= timing.total


def test_self_influence_pages_through_all_rows_in_order(client: Client, index: Index) -> None:
    scores = index.self_influence()
    top, rest = client.self_influence(k=150), client.self_influence(k=MAX_K, offset=150, examples=False)
    found = top.results + rest.results
    assert top.rows_total == 400
    assert sorted(hit.row for hit in found) == list(range(400))
    np.testing.assert_array_equal([hit.score for hit in found], np.sort(scores)[::-1])
    assert top.results[0].example == TASK.render(TASK.train[top.results[0].row])
    assert rest.results[0].example is None
    bottom = client.self_influence(k=3, order="ascending", method="graddot")
    assert [hit.score for hit in bottom.results] == np.sort(index.self_influence(method="graddot"))[:3].tolist()


def test_self_influence_is_computed_once_for_its_pages_and_anew_for_other_options(
    digits_index: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, asked = Index.self_influence, []

    def counted(index: Index, **options: Any) -> Any:
        asked.append(options)
        return compute(index, **options)

    monkeypatch.setattr(Index, "self_influence", counted)
    with serving_when_ready(create_app(digits_index.open())) as address, Client(address) as client:
        pages = [client.self_influence(k=50, offset=offset) for offset in (0, 50, 100)]
        assert len(asked) == 1
        first = client.index().checkpoints[0].name
        others = [
            client.self_influence(k=3, method="graddot"),
            client.self_influence(k=3, method="graddot", checkpoints=[first]),
            client.self_influence(k=50),
        ]
        assert len(asked) == 4
    alone = digits_index.open()
    scores = np.sort(compute(alone, method="tracin"))[::-1]
    assert [hit.score for page in pages for hit in page.results] == scores[:150].tolist()
    one = np.sort(compute(alone, method="graddot", checkpoints=[first]))[::-1]
    assert [hit.score for hit in others[1].results] == one[:3].tolist()
    assert others[2].results == pages[0].results


def test_self_influence_of_some_labels(client: Client) -> None:
    found = client.self_influence(k=MAX_K, labels=[4])
    assert [hit.row for hit in found.results if hit.label != 4] == []
    assert found.rows_total == len(found.results) == sum(label == 4 for _, label in (TASK.train[r] for r in range(400)))


def test_examples(client: Client) -> None:
    shown = client.examples("train", 17)
    assert shown.label == TASK.train[17][1]
    assert shown.prediction is not None
    assert shown.example == TASK.render(TASK.train[17])
    asked = client.examples("query", 17)
    assert asked.label == TASK.query[17][1]
    assert asked.prediction == client.influence(query_rows=[17]).results[0].query.prediction
    with pytest.raises(NotFoundError, match="no row 60 in the query data set; its rows are 0 to 59"):
        client.examples("query", 60)
    with pytest.raises(NotFoundError, match="0 to 399"):
        client.examples("train", 400)


def test_index_says_what_may_be_asked_and_not_where_it_lies(url: str, client: Client, digits_index: DigitsRun) -> None:
    details = client.index()
    assert (details.rows, details.query_rows, details.dimensions) == (400, 60, 256)
    assert details.class_names == list(digits_task.NAMES)
    assert len(details.checkpoints) == 3
    assert set(details.conventions) == set(details.methods)
    told = "Curvature: Gauss-Newton matrix: of the log odds of each row's label"
    assert {name for name, text in details.conventions.items() if told in text} == {"influence", "source"}
    assert told in client.influence(query_rows=[0], method="influence").convention
    assert str(digits_index.index.parent) not in httpx.get(f"{url}/index").text


def test_health_and_documentation(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
    assert "swagger" in httpx.get(f"{url}/docs").text
    described = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {"/influence", "/self-influence", "/examples/{split}/{row}", "/index"} <= set(described)
    assert "application/problem+json" in described["/influence"]["post"]["responses"]["422"]["content"]


def test_answers_do_not_wait_for_acknowledgements(url: str) -> None:
    """Two small packets and Nagle's algorithm cost 40 ms each time on a kept connection; not on its first exchanges."""
    with httpx.Client(base_url=url) as kept:
        taken = [kept.get("/healthz").elapsed.total_seconds() for _ in range(60)]
    assert min(taken[30:]) < 0.03


def problem(response: httpx.Response, status: int) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert found.status == status
    return found


@pytest.mark.parametrize(
    ("body", "field", "remedy"),
    [
        ({"query_rows": [60]}, "query_rows[0]", "0 to 59"),
        ({"query_rows": [0], "method": "magic"}, "method", "tracin, graddot, cosine"),
        ({"query_rows": [0], "checkpoints": ["none.pt"]}, "checkpoints[0]", "step-"),
        ({"query_rows": [0], "k": MAX_K + 1}, "k", str(MAX_K)),
        ({"query_rows": [0], "k": "5"}, "k", "integer"),
        ({"query_rows": [0], "filter": {"labels": [3, None]}}, "filter.labels[1]", "number or the name of a class"),
        ({"query_rows": [0], "filter": {"labels": [True]}}, "filter.labels[0]", "number"),
        ({"query_rows": [0], "filter": {"where": {"loss": {"min": "1"}}}}, "filter.where.loss.min", "number"),
        ({"query_rows": [0], "filter": {"where": {"loss": {"above": 1}}}}, "filter.where.loss.above", "no such field"),
        ({"query_rows": [0], "filter": {"where": {"loss": {}}}}, "filter.where.loss", "min, max and in"),
        ({"query_rows": [0], "filter": {"where": {"label": {"in": [[]]}}}}, "filter.where.label.in[0]", "name"),
        ({"query_rows": [0], "aggregate": "sum"}, "aggregate", "mean"),
        ({"query_rows": [0] * (MAX_QUERIES + 1)}, "query_rows", str(MAX_QUERIES)),
        ({"query_rows": [0] * 26, "k": 1000}, "", "25,000 hits"),
        ({"query_rows": [0], "colour": True}, "colour", "leave it out"),
        ({"query_rows": [0], "train_rows": [0]}, "", "exactly one of example, examples, query_rows, train_rows"),
        ({"example": {"image": [[1, 2], [3, 4]]}}, "example", "8"),
        ({"examples": [{"image": pixels(0)}, {"image": "@@@"}]}, "examples[1]", "base64"),
        ({"example": {"image": pixels(0), "label": 11}}, "example", "0 to 9"),
        ({"example": {"path": "/etc/passwd"}}, "example", "image"),
    ],
)
def test_a_wrong_request_is_told_the_field_and_the_remedy(url: str, body: Any, field: str, remedy: str) -> None:
    found = problem(httpx.post(f"{url}/influence", json=body), 422)
    assert found.errors[0].field == field
    assert remedy in found.errors[0].detail


@pytest.mark.parametrize(
    "wrong",
    [
        {"filter": {"rows": [400]}},
        {"filter": {"labels": [77]}},
        {"filter": {"labels": ["eleven"]}},
        {"filter": {"where": {"colour": {"min": 1}}}},
        {"method": "cosine", "weights": "learning_rate"},
    ],
)
def test_what_the_index_refuses_is_refused_in_its_words(client: Client, index: Index, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.influence(query_rows=[0], **wrong)
    choice = wrong | {"filter": gradtrace.RowFilter(**wrong["filter"])} if "filter" in wrong else wrong
    with pytest.raises(gradtrace.QueryError) as raised:
        index.influence([TASK.query[0]], **choice)
    assert refused.value.detail == str(raised.value)


def test_other_wrong_requests(url: str) -> None:
    broken = httpx.post(f"{url}/influence", content=b'{"k": ', headers={"Content-Type": "application/json"})
    assert "not JSON" in problem(broken, 422).detail
    assert "Content-Type" in problem(httpx.post(f"{url}/influence", content=b'{"k": 3}'), 422).detail
    assert "Content-Type" in problem(httpx.post(f"{url}/influence", json=[1]), 422).detail
    assert "Content-Type" in problem(httpx.post(f"{url}/influence"), 422).detail
    deep = httpx.post(f"{url}/influence", content=b"[" * 100_000, headers={"Content-Type": "application/json"})
    assert "JSON" in problem(deep, 422).detail
    assert "/docs" in problem(httpx.get(f"{url}/nowhere"), 404).detail
    assert httpx.get(f"{url}/influence").headers["allow"] == "POST"
    assert problem(httpx.get(f"{url}/self-influence?k=0"), 422).errors[0].field == "k"
    assert problem(httpx.get(f"{url}/self-influence?colour=1"), 422).errors[0].field == "colour"
    assert problem(httpx.get(f"{url}/examples/test/0"), 422).errors[0].field == "split"
    assert problem(httpx.get(f"{url}/examples/train/-1"), 422).errors[0].field == "row"


@pytest.mark.parametrize(
    "body",
    [
        {"query_rows": [0], "checkpoints": ["\ud800"]},
        {"query_rows": [0], "filter": {"labels": ["\ud800"]}},
        {"example": {"\ud800": 1}},
    ],
)
def test_half_a_surrogate_pair_is_refused(url: str, body: dict[str, Any]) -> None:
    escaped = json.dumps(body)
    problem(httpx.post(f"{url}/influence", content=escaped, headers={"Content-Type": "application/json"}), 422)


def test_a_body_beyond_the_limit_is_refused_announced_or_not(url: str) -> None:
    big = b" " * (16 * 2**20 + 1)
    headers = {"Content-Type": "application/json"}
    assert "bytes" in problem(httpx.post(f"{url}/influence", content=big, headers=headers), 413).detail
    chunked = httpx.post(f"{url}/influence", content=iter([big[:1000], big]), headers=headers)
    assert "bytes" in problem(chunked, 413).detail


def test_a_failure_tells_nothing_of_the_inside(digits_index: DigitsRun, caplog: pytest.LogCaptureFixture) -> None:
    broken = digits_index.open()
    broken.task = BrokenNames(digits_task.model, TASK.train, TASK.query)
    with serving(create_app(broken)) as url, Client(url, retries=0) as client:
        with pytest.raises(ServiceError) as caught:
            client.influence(query_rows=[0])
        assert caught.value.status == 500
        assert "secret" not in str(caught.value)
        assert client.index().rows == digits_task.TRAIN_ROWS  # and the service goes on
    assert "a secret place" in caplog.text


class BrokenNames(type(TASK)):  # type: ignore[misc]
    def label_name(self, label: object) -> str | None:
        raise OSError("a secret place")


def test_the_same_question_gives_the_same_answer_alone_in_a_batch_and_at_once(url: str) -> None:
    async def ask() -> tuple[list[InfluenceAnswer], InfluenceAnswer]:
        async with AsyncClient(url) as client:
            alone = await asyncio.gather(*(client.influence(query_rows=[row], k=5) for row in range(12)))
            return list(alone), await client.influence(query_rows=list(range(12)), k=5)

    alone, together = asyncio.run(ask())
    assert [result for answer in alone for result in rows(answer)] == rows(together)
    for one, result in zip(alone, together.results, strict=True):
        mine = [hit.score for hit in one.results[0].proponents]
        np.testing.assert_allclose(mine, [hit.score for hit in result.proponents], rtol=1e-5)


def test_the_app_answers_in_process(digits_index: DigitsRun) -> None:
    async def ask() -> int:
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://in.process", transport=transport) as client:
            return (await client.influence(query_rows=[0], k=1)).index.rows

    app = create_app(digits_index.open())
    try:
        assert asyncio.run(ask()) == 400
    finally:
        app.state.engine.close()


def test_one_thread_owns_the_index_and_a_full_queue_refuses(index: Index) -> None:
    engine = Engine([ThreadWorker(OpenIndex(index))], Settings(queue_size=2))
    release = threading.Event()

    async def crowd() -> list[Any]:
        held = engine.run(
            Work(None, each_alone(lambda *asked: (release.wait(60), threading.current_thread().name, asked[2])))
        )
        tasks = [asyncio.ensure_future(held)]
        while not engine.computing:  # until the worker has it
            await asyncio.sleep(0.01)
        other = Work(None, each_alone(lambda *asked: (True, threading.current_thread().name, asked[2])))
        tasks += [asyncio.ensure_future(engine.run(other)) for _ in range(4)]
        while sum(task.done() for task in tasks) < 2:  # until two are refused, the others being queued
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # they shall have waited
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(crowd())
    engine.close()
    assert [type(answer) for answer in answers] == [tuple, tuple, tuple, QueueFullError, QueueFullError]
    assert len({name for _, name, _ in answers[:3]}) == 1
    assert all(waited >= 45 for _, _, waited in answers[1:3])


def test_a_full_queue_is_told_as_429(digits_index: DigitsRun) -> None:
    release = threading.Event()
    app = create_app(digits_index.open(), Settings(queue_size=1))
    with serving(app) as url, ThreadPoolExecutor(3) as pool:
        app.state.engine.workers[0].thread.submit(release.wait, 60)
        waiting = [pool.submit(httpx.post, f"{url}/influence", json={"query_rows": [0]}) for _ in range(3)]
        response = next(as_completed(waiting)).result()
        release.set()
    assert "later" in problem(response, 429).detail
    assert int(response.headers["retry-after"]) >= 1


def test_deleted_rows_are_in_no_answer(digits_index: DigitsRun, tmp_path: Path) -> None:
    shutil.copytree(digits_index.index.parent, tmp_path / "run")
    path = tmp_path / "run" / "index"
    delete_rows(path, range(0, 400, 2))
    with serving(create_app(gradtrace.open_index(path, TASK))) as url, Client(url) as client:
        found = client.self_influence(k=300)
        assert [hit.row % 2 for hit in found.results] == [1] * 200
        assert found.rows_total == 200
        assert all(hit.row % 2 for hit in client.influence(query_rows=[0], k=300).results[0].opponents)
        answer = problem(httpx.get(f"{url}/examples/train/4"), 404)
        assert "row 4 of the training data was deleted" in answer.model_dump_json()
        assert httpx.get(f"{url}/examples/train/5").status_code == 200


def test_conventions_claim_of_each_method_what_holds_of_it() -> None:
    told = {name: convention(name) for name in METHODS}
    likenesses = {name for name, text in told.items() if "compressed coordinates" not in text}
    assert likenesses == {"repsim", "representer", "bm25"}
    assert all("opponent, it raised" not in told[name] for name in likenesses)
    forecasts = {name for name, text in told.items() if "not a forecast" not in text}
    assert forecasts == {"influence", "source", "fast-source", "trak", "hydra"}
