"""Lists of rows over real HTTP, and what an index says of its data. Figures are compared with a plain forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import digits_task
import gradtrace
import tiny
from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace import Index, Task
from gradtrace_client import Client, ExamplesAnswer, InvalidRequestError
from gradtrace_indexer import delete_rows
from gradtrace_service.answers.browsed import browsed
from gradtrace_service.answers.row_texts import RowTexts
from gradtrace_service.app import create_app
from plain_forward import Expected, of_last_digits
from small_tasks import TEXTS, house_task, text_task

TASK = digits_task.TASK


@pytest.fixture(scope="module")
def expected(digits_index: DigitsRun) -> dict[str, Expected]:
    return of_last_digits(digits_index)


def wrong(known: Expected) -> list[int]:
    return np.flatnonzero(known.labels != known.predictions).tolist()


def complete(client: Client, split: Any, **options: Any) -> ExamplesAnswer:
    """The list once nothing of it is pending."""
    wait_until(lambda: client.list_examples(split, **options).pending == 0)
    return client.list_examples(split, **options)


def rows(answer: ExamplesAnswer) -> list[int]:
    return [example.row for example in answer.results]


@pytest.mark.parametrize("split", ["train", "query"])
def test_rows_are_listed_with_what_the_model_makes_of_them(
    client: Client, expected: dict[str, Expected], split: Any
) -> None:
    answer, known = complete(client, split, k=1000), expected[split]
    assert answer.note is None
    assert rows(answer) == list(range(len(known.labels)))
    assert answer.rows_total == len(known.labels)
    assert [example.label for example in answer.results] == known.labels.tolist()
    assert [example.prediction for example in answer.results] == known.predictions.tolist()
    np.testing.assert_allclose([example.loss for example in answer.results], known.losses, rtol=1e-4, atol=1e-6)
    for example in answer.results[:9]:
        assert (example.split, example.label_name) == (split, digits_task.NAMES[int(example.label or 0)])
        assert example.correct == (example.prediction == example.label)
        assert example.example == TASK.render(getattr(TASK, split)[example.row])


@pytest.mark.parametrize("split", ["train", "query"])
def test_rows_are_chosen_by_conditions(client: Client, expected: dict[str, Expected], split: Any) -> None:
    complete(client, split)
    known, every = expected[split], {"k": 1000, "render": False}
    assert rows(client.list_examples(split, correct=False, **every)) == wrong(known)
    either = np.flatnonzero(np.isin(known.labels, [3, 5]))
    assert rows(client.list_examples(split, labels=[3, "five"], **every)) == either.tolist()
    predicted = np.flatnonzero(known.predictions == 8)
    assert rows(client.list_examples(split, predictions=["eight"], **every)) == predicted.tolist()
    middle = float(np.median(known.losses))
    dear = client.list_examples(split, min_loss=middle, max_loss=4 * middle, **every)
    assert rows(dear) == np.flatnonzero((known.losses >= middle) & (known.losses <= 4 * middle)).tolist()
    some = client.list_examples(split, rows=[5, 2, 50], correct=True, **every)
    assert rows(some) == [row for row in (2, 5, 50) if row not in wrong(known)]
    assert client.list_examples(split, min_loss=1e6).rows_total == 0
    assert all(example.example is None for example in some.results)


def test_rows_are_ordered_and_come_in_pages(client: Client, expected: dict[str, Expected]) -> None:
    complete(client, "query")
    losses = expected["query"].losses
    pages = [rows(client.list_examples("query", order="-loss", k=25, offset=at)) for at in (0, 25, 50, 75)]
    by_loss = [row for page in pages for row in page]
    np.testing.assert_allclose(losses[by_loss], np.sort(losses)[::-1], rtol=1e-4, atol=1e-6)
    assert [len(page) for page in pages] == [25, 25, 10, 0]
    assert by_loss[::-1] == rows(client.list_examples("query", order="loss", k=60))
    assert rows(client.list_examples("train", order="-row", k=3)) == [399, 398, 397]


def test_one_query_row_has_a_prediction_before_all_have(digits_index: DigitsRun, expected: dict[str, Expected]) -> None:
    with serving_when_ready(create_app(digits_index.open())) as url, Client(url) as client:
        shown = client.examples("query", 41)
    known = expected["query"]
    assert (shown.label, shown.prediction) == (known.labels[41], known.predictions[41])
    assert shown.correct == (41 not in wrong(known))
    assert shown.loss == pytest.approx(known.losses[41], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ("k=0", "k", "greater than or equal to 1"),
        ("k=1001", "k", "less than or equal to 1000"),
        ("offset=-1", "offset", "greater than or equal to 0"),
        ("labels=eleven", "labels[0]", "there is no 'eleven'; this index has zero, one"),
        ("labels=three&predictions=nil", "predictions[0]", "there is no 'nil'"),
        ("correct=perhaps", "correct", "boolean"),
        ("min_loss=nan", "min_loss", "finite"),
        ("rows=3&rows=400", "rows[1]", "there is no row 400 in the train data set; its rows are 0 to 399"),
        ("rows=-1", "rows[0]", "greater than or equal to 0"),
        ("order=random", "order", "'-loss'"),
        ("text=seven", "text", "shown without words"),
        (f"text={'x' * 201}", "text", "at most 200 characters"),
        ("label=3", "label", "no such field"),
        ("index=other", "index", "there is no index"),
    ],
)
def test_what_cannot_be_listed_is_refused(url: str, asked: str, field: str, words: str) -> None:
    response = httpx.get(f"{url}/examples/train?{asked}")
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["field"] == field
    assert words in error["detail"]


def test_deleted_rows_are_not_listed(digits_index: DigitsRun, tmp_path: Path) -> None:
    index = tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(12)), tmp_path)
    delete_rows(index.directory, [3, 7])
    reopened = gradtrace.open_index(index.directory, index.task)
    with serving_when_ready(create_app(reopened)) as url, Client(url) as client:
        answer = client.list_examples("train")
        assert rows(answer) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
        assert [example.label for example in answer.results] == [index.task.train[row][1] for row in rows(answer)]
        assert all(type(example.label) is int for example in answer.results)
        assert rows(client.list_examples("train", rows=[3, 4])) == [4]
        nothing = client.list_examples("query")
        assert (nothing.rows_total, nothing.results) == (0, [])
        assert nothing.note == "the task has no query data set"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    index = tiny.build(text_task(), tmp_path_factory.mktemp("texts"))
    with serving_when_ready(create_app(index)) as url, Client(url) as client:
        yield client


@pytest.mark.parametrize("words", ["film", "FINE film", "straße", "STRASSE", "absent", ":", "in dull"])
def test_texts_are_searched_for_words(texts: Client, words: str) -> None:
    found = complete(texts, "query", text=words, k=100)
    holding = [
        row for row, text in enumerate(TEXTS) if all(word.casefold() in text.casefold() for word in words.split())
    ]
    assert rows(found) == holding
    assert rows(texts.list_examples("train", text=words, labels=["+"], k=100)) == [row for row in holding if row % 2]


def test_text_beyond_the_room_is_said_not_to_be_searched(tmp_path: Path) -> None:
    index = tiny.build(text_task(), tmp_path)
    browsed(index)._texts["train"] = RowTexts(index.task, index.task.train, index.present, kept=700)
    with serving_when_ready(create_app(index)) as url, Client(url) as client:
        found = complete(client, "train", text="film", k=100)
    assert found.note is not None
    searched = int(found.note.split()[3])
    assert 5 < searched < 20
    assert found.note == f"only the first {searched} rows were searched: more text is not kept"
    assert rows(found) == [row for row in range(searched) if "film" in TEXTS[row].casefold()]


class Slow(tiny.ClassTask):
    """A prediction takes a while; one query has no label, one is too wide, and one has a loss that is not a number."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(tiny.mlp, tiny.classes(12))
        self.query = [
            *tiny.classes(40, seed=1),
            (torch.ones(5), None),
            (torch.ones(9), 1),
            (torch.full((5,), np.nan), 2),
        ]
        self.seconds = seconds

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().predict(model, batch)


def test_queries_at_fault_have_what_is_known_of_them(tmp_path: Path) -> None:
    index = tiny.build(Slow(), tmp_path)
    model = tiny.loaded(index.task, tiny.checkpoints(index.task, tmp_path / "same")[-1])
    with serving_when_ready(create_app(index)) as url, Client(url) as client:
        answer = complete(client, "query", k=100)
        unlabelled, wide, nan = answer.results[40:]
        assert (unlabelled.label, unlabelled.loss, unlabelled.correct) == (None, None, None)
        assert unlabelled.prediction == int(model(torch.ones(1, 5)).argmax())
        assert (wide.label, wide.prediction, wide.loss) == (1, None, None)
        assert (nan.label, nan.loss) == (2, None)
        for example, (features, label) in zip(answer.results, index.task.query[:40], strict=False):
            loss = F.cross_entropy(model(features[None]), torch.tensor([label]))
            assert example.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert rows(client.list_examples("query", order="-loss", k=100))[-3:] == [40, 41, 42]


def test_what_takes_long_is_completed_while_others_are_answered(tmp_path: Path) -> None:
    index = tiny.build(Slow(), tmp_path)
    index.contents.last_model.task.seconds = 0.15  # type: ignore[attr-defined]
    app = create_app(index)
    with serving_when_ready(app) as url, Client(url) as client:
        first = client.list_examples("query", k=100)
        assert 0 < first.pending < 43
        assert first.note == f"predictions and losses are known of the first {43 - first.pending} rows so far"
        assert first.results[-1].prediction is None
        assert client.list_examples("query", correct=False).rows_total <= 43 - first.pending
        assert client.influence(train_rows=[3]).results[0].query.row == 3
        done = browsed(index).queries.done
        assert done < 43  # it was answered in between
        wait_until(lambda: browsed(index).queries.pending == 0)  # although nobody asks for it any more
        wait_until(lambda: not app.state.background._running)
        last = client.list_examples("query", k=100)
        assert (last.pending, last.note) == (0, None)


def details(task: Task, tmp_path: Path) -> Any:
    with serving_when_ready(create_app(tiny.build(task, tmp_path))) as url, Client(url) as client:
        return client.index()


def test_the_index_says_what_an_example_looks_like(client: Client, index: Index, tmp_path: Path) -> None:
    digits = client.index()
    assert digits.splits == {"train": 400, "query": 60}
    assert digits.input.model_dump() == {"kind": "image", "height": 8, "width": 8, "channels": 1}
    assert digits.columns == list(index.columns)
    assert (digits.layers, digits.can_retrain) == (["1", "3"], False)
    shares = client.influence(query_rows=[1], include=["layers"]).results[0].proponents[0].layers
    assert set(digits.layers) == set(shares or ())
    assert details(text_task(), tmp_path / "text").input.kind == "text"
    plain = details(tiny.ClassTask(tiny.mlp, tiny.classes(12)), tmp_path / "plain")
    assert (plain.input, plain.splits) == (None, {"train": 12, "query": 0})


def test_the_index_says_which_values_features_have(tmp_path: Path) -> None:
    found = details(house_task(), tmp_path)
    age, rooms_, place = found.input.features
    assert (age.name, age.min, age.max, age.median) == ("age", 7.0, 41.0, 12.5)
    assert (age.integer, age.choices, age.optional) == (False, None, True)
    assert (rooms_.min, rooms_.max, rooms_.median, rooms_.integer, rooms_.optional) == (1, 5, 2.5, True, False)
    assert (place.min, place.choices) == (None, ["BAY", "INLAND", "ISLAND"])


def test_an_own_parse_is_of_another_form_and_fit_can_retrain(tmp_path: Path) -> None:
    class Own(tiny.ClassTask):
        def parse(self, payload: Any) -> Any:
            return torch.tensor(payload["x"]), None

        def fit(self, rows: Any, seed: int) -> nn.Module:
            return self.model()

    found = details(Own(tiny.mlp, tiny.classes(12)), tmp_path)
    assert found.input.kind == "other"
    assert found.can_retrain


def test_values_are_listed_as_values(tmp_path: Path) -> None:
    index = tiny.build(house_task(), tmp_path)
    with serving_when_ready(create_app(index)) as url, Client(url) as client:
        answer = complete(client, "query")
        assert [example.label for example in answer.results] == [1.5, 2.0, 3.0, 4.0]
        assert all(example.correct is None for example in answer.results)
        assert answer.results[1].example == {"features": {"age": None, "rooms": 5.0, "place": "ISLAND"}}
        assert rows(client.list_examples("train", text="island", k=20)) == [1, 5, 9, 13, 17]
        with pytest.raises(InvalidRequestError, match="have no names"):
            client.list_examples("query", labels=["BAY"])


def test_a_list_shows_itself(client: Client) -> None:
    answer = client.list_examples("train", k=3)
    assert list(answer.to_pandas()["row"]) == [0, 1, 2]
    assert answer._repr_html_().count("<img ") == 3
