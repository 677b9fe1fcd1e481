"""What does not fit is refused by its field (422), alone; a task that fails on everything is the service's failure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from conftest import wait_until
from gradtrace import Index, Task, open_index
from gradtrace.tasks import TabularRegression, TextClassification
from gradtrace_indexer import add_kernels, fit_representer
from gradtrace_service.answers.unfit_queries import failing_alone
from gradtrace_service.app import create_app
from gradtrace_service.server import serving

WORDS, WIDTH = 20, 5


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_those_that_fail_alone_are_found_in_their_order(sound: list[bool]) -> None:
    def attempt(items: Sequence[int]) -> None:
        bad = [item for item in items if not sound[item]]
        if bad:
            raise ValueError(bad[0])

    found = [(at, error.args[0]) for at, error in failing_alone(attempt, range(len(sound)))]
    assert found == [(at, at) for at, is_sound in enumerate(sound) if not is_sound]


class OwnTask(Task):
    """As a user writes one, without a check of anything."""

    passed = 0  # examples that went through the loss, of all copies
    broken: Exception | None = None

    def __init__(self) -> None:
        self.train = tiny.classes(30, labels=3)
        self.query = [(torch.zeros(WIDTH), 0), (torch.zeros(WIDTH), 7), (torch.full((WIDTH,), torch.nan), 1)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3))

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        OwnTask.passed += len(batch[1])
        if self.broken is not None:
            raise self.broken
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def parse(self, payload: Any) -> tuple[Any, Any]:
        x = payload["x"]
        return torch.tensor(x) if isinstance(x, list) else x, payload.get("label")


class OwnTokens(OwnTask):
    """Mean embeddings of token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.train = [(torch.randint(WORDS, (WIDTH,)), row % 3) for row in range(30)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(4 * WIDTH, 3))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[str, OwnTask]]:
    task = OwnTask()
    index = tiny.build(task, tmp_path)
    with serving(create_app(index)) as url:
        yield url, task


GOOD = {"x": [0.5] * WIDTH, "label": 1}


def asked(url: str, path: str = "/influence", **body: Any) -> httpx.Response:
    return httpx.post(
        url + path, content=json.dumps({"k": 2, **body}), headers={"Content-Type": "application/json"}, timeout=60
    )


def refused_field(response: httpx.Response) -> str:
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    assert error["detail"]
    return str(error["field"])


NAN = GOOD | {"x": [float("nan")] * WIDTH}
UNFIT = [
    GOOD | {"label": 3},
    GOOD | {"label": -1},
    GOOD | {"label": "one"},
    GOOD | {"label": [1]},
    GOOD | {"label": 0.5},
    GOOD | {"x": [0.5] * 4},
    GOOD | {"x": []},
    GOOD | {"x": [[0.5] * WIDTH]},
    GOOD | {"x": ["a"] * WIDTH},
    GOOD | {"x": "word"},
    GOOD | {"x": 7},
    GOOD | {"x": None},
    GOOD | {"x": {"y": 1}},
    NAN,
    GOOD | {"x": [1e39] * WIDTH},
    {"x": [0.5] * 4},
    {"x": "word"},
    {"y": 1},
    {},
]


def test_a_task_without_a_check_of_its_own(own: tuple[str, OwnTask]) -> None:
    url, _ = own
    for payload in UNFIT:
        assert refused_field(asked(url, example=payload)) == "example", payload
        assert refused_field(asked(url, examples=[GOOD, GOOD, payload])) == "examples[2]", payload
    assert asked(url, examples=[GOOD, GOOD]).status_code == 200
    assert "IndexError" in asked(url, example=GOOD | {"label": 3}).text
    assert refused_field(asked(url, query_rows=[0, 1])) == "query_rows[1]"
    assert refused_field(asked(url, query_rows=[2])) == "query_rows[0]"


@pytest.mark.parametrize("fields", [{"aggregate": "mean"}, {"rescore": True}, {"include": ["layers", "percentiles"]}])
def test_options_change_nothing_of_it(own: tuple[str, OwnTask], fields: dict[str, Any]) -> None:
    assert refused_field(asked(own[0], examples=[GOOD, UNFIT[0]], **fields)) == "examples[1]"


def test_token_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    with serving(create_app(tiny.build(OwnTokens(), tmp_path))) as url:
        for ids in ([WORDS] * WIDTH, [-1] * WIDTH, [1.5] * WIDTH, [[1] * WIDTH] * 2):
            assert refused_field(asked(url, example={"x": ids, "label": 1})) == "example"
        assert asked(url, example={"x": [WORDS - 1] * WIDTH, "label": 1}).status_code == 200


def test_every_method_names_the_field(tmp_path: Path) -> None:
    task = OwnTask()
    tiny.build(task, tmp_path, basis="spectral", dimensions=20)
    add_kernels(tmp_path / "index", progress=False)
    fit_representer(tmp_path / "index")
    index = open_index(tmp_path / "index", task)
    assert {"tracin", "influence", "source", "trak", "repsim", "representer"} <= set(index.methods)
    with serving(create_app(index)) as url:
        for method in index.methods:
            assert refused_field(asked(url, examples=[GOOD, UNFIT[0]], method=method)) == "examples[1]", method
            assert refused_field(asked(url, examples=[GOOD, NAN], method=method)) == "examples[1]", method


def test_groups_and_pairs(own: tuple[str, OwnTask]) -> None:
    def groups(**body: Any) -> httpx.Response:
        return httpx.post(f"{own[0]}/influence/groups", json=body)

    def pairs(**body: Any) -> httpx.Response:
        return httpx.post(f"{own[0]}/influence/pairs", json=body)

    assert refused_field(groups(examples=[GOOD, UNFIT[0]])) == "examples[1]"
    assert groups(examples=[GOOD]).status_code == 200
    assert refused_field(pairs(train_examples=[GOOD, GOOD, UNFIT[0]], query_rows=[0])) == "train_examples[2]"
    assert refused_field(pairs(train_examples=[GOOD], example=UNFIT[5])) == "example"
    assert refused_field(pairs(train_rows=[3], query_rows=[0, 1])) == "query_rows[1]"
    assert pairs(train_examples=[GOOD], example=GOOD).status_code == 200


def test_what_the_index_refuses_of_every_query_has_no_field_of_one(own: tuple[str, OwnTask]) -> None:
    response = asked(own[0], examples=[GOOD, GOOD], method="cosine", weights="learning_rate")
    assert (response.status_code, response.json()["errors"]) == (422, [])
    assert "weights" in response.json()["detail"]


@pytest.mark.parametrize(
    "error", [IndexError("inside"), RuntimeError("inside"), ValueError("inside"), OSError("inside")]
)
def test_a_task_that_fails_on_training_rows_too_is_the_service_s_failure(
    own: tuple[str, OwnTask], error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = own
    monkeypatch.setattr(OwnTask, "broken", error)
    failed = asked(url, example=GOOD)
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:gradtrace:problem:failure")
    assert "inside" not in failed.text
    assert "inside" in caplog.text
    monkeypatch.setattr(OwnTask, "broken", None)
    assert asked(url, example=GOOD).status_code == 200


def test_examples_that_do_not_stack_are_asked_about_one_by_one(tmp_path: Path) -> None:
    class AnyLength(OwnTask):
        def model(self) -> nn.Module:
            return nn.Linear(1, 3)

        def predict(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0].flatten(1).mean(1, keepdim=True))

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(self.predict(model, batch), batch[1], reduction="none")

    index = tiny.build(AnyLength(), tmp_path)
    app = create_app(index)
    long, column = {"x": [0.1] * 9, "label": 0}, GOOD | {"x": [[0.5]] * WIDTH}
    with serving(app) as url:
        assert asked(url, examples=[GOOD, long]).status_code == 200  # of two sizes: in a batch each
        refused = asked(url, examples=[GOOD, column])
        assert refused_field(refused) == "examples"
        assert "one by one" in refused.text
        responses = together(app, url, [{"example": GOOD}, {"example": column}, {"example": GOOD}])
    assert [response.status_code for response in responses] == [200] * 3


def together(app: FastAPI, url: str, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    """The answers to requests that wait while the worker is held, so that they are taken in one batch."""
    held, go_on = threading.Event(), threading.Event()
    wait_until(lambda: app.state.ready)  # nothing but these requests is then computed

    def hold() -> None:
        held.set()
        assert go_on.wait(60)

    app.state.engine.workers[0].thread.submit(hold)
    assert held.wait(60)
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(httpx.get, f"{url}/index", timeout=60)  # takes the slot, and waits for the worker
        wait_until(lambda: app.state.engine.computing)
        sent = [pool.submit(asked, url, **body) for body in bodies]
        wait_until(lambda: app.state.engine.waiting == len(bodies))
        go_on.set()
        assert first.result().status_code == 200
        return [one.result() for one in sent]


def test_in_a_batch_only_what_does_not_fit_is_refused_and_the_others_are_answered_together(tmp_path: Path) -> None:
    task = OwnTask()
    index = tiny.build(task, tmp_path)
    expected = asked_of(index)
    app = create_app(index)
    label, unread = UNFIT[0], UNFIT[-1]
    with serving(app) as url:
        wait_until(lambda: app.state.ready)
        OwnTask.passed = 0
        bodies = [{"example": payload} for payload in (GOOD, NAN, GOOD, unread, GOOD, GOOD, label, GOOD, GOOD)]
        responses = together(app, url, bodies)
        passed = OwnTask.passed
    assert [response.status_code for response in responses] == [200, 422, 200, 422, 200, 200, 422, 200, 200]
    assert {refused_field(response) for response in responses if response.status_code == 422} == {"example"}
    for response in responses:
        if response.status_code == 200:
            answer = response.json()
            assert answer["timing_ms"]["batch"] == 6
            assert [hit["row"] for hit in answer["results"][0]["proponents"]] == expected
    assert passed < 9 * 2 * 8  # of eight that were parsed at two checkpoints: no full answer for each of them


def asked_of(index: Index) -> list[int]:
    (result,) = index.influence([(torch.tensor(GOOD["x"]), 1)], k=2)
    return [hit.row for hit in result.proponents]


def test_a_ready_made_table_refuses_what_overflows_only_in_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30, 2)).astype(np.float32)
    task = TabularRegression(
        lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)),
        (table, table.sum(1)),
        feature_names=("a", "b"),
        std=1e-3,
    )
    with serving(create_app(tiny.build(task, tmp_path))) as url:
        good = {"features": {"a": 1, "b": 2}, "label": 3}
        for features in ({"a": 3e38, "b": -3e38}, {"a": "x", "b": 1}, {"a": None, "b": 1}, {"a": 1}, [1, 2], "ab"):
            assert refused_field(asked(url, examples=[good, {"features": features}])) == "examples[1]"
        for label in ("word", [1], True, 1e39):
            assert refused_field(asked(url, example=good | {"label": label})) == "example"


def test_a_ready_made_text_refuses_by_the_field(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(WORDS, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.out((self.words(ids) * mask[:, :, None]).sum(1))

    task = TextClassification(Mean, ([[1, 2], [3], [4, 5, 6]] * 10, [0, 1, 2] * 10), vocabulary_size=WORDS)
    with serving(create_app(tiny.build(task, tmp_path))) as url:
        for ids in ([], [WORDS], [-1], ["a"], [[1]], [1.5], [True], "ab", 3, None, [1] * 513):
            assert refused_field(asked(url, example={"token_ids": ids, "label": 1})) == "example"
        for label in (3, -1, "three", 0.5, [1], True):
            assert refused_field(asked(url, example={"token_ids": [1], "label": label})) == "example"


def test_a_method_that_the_index_lacks_is_refused_with_what_brings_it(own: tuple[str, OwnTask], tmp_path: Path) -> None:
    url, _ = own
    for method, remedy in (
        ("trak", "gradtrace kernels"),
        ("representer", "gradtrace representer"),
        ("hydra", "Recorder"),
    ):
        refused = asked(url, example=GOOD, method=method)
        assert refused_field(refused) == "method"
        assert remedy in refused.json()["errors"][0]["detail"]
    assert "tracin" in asked(url, example=GOOD, method="magic").json()["errors"][0]["detail"]
