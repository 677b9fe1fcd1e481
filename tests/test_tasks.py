from __future__ import annotations

import base64
import contextlib
import io
import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradtrace.errors import DatasetError, QueryError
from gradtrace.tasks import (
    ImageClassification,
    TabularClassification,
    TabularRegression,
    TextClassification,
    Vocabulary,
)

pytestmark = pytest.mark.unit

NAMES = ("cat", "dog", "ship")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def images(rows: int, channels: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (rows, 5, 4, channels), dtype=np.uint8)


def image_task(channels: int = 3, **options: Any) -> ImageClassification:
    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(20 * channels, 3))

    statistics = {"mean": MEAN, "std": STD} if channels == 3 else {"mean": 0.3, "std": 0.7}
    data = (images(7, channels), np.arange(7) % 3)
    return ImageClassification(model, data, **{"class_names": NAMES, **statistics, **options})


def table_task(kind: type[TabularClassification] | type[TabularRegression]) -> Any:
    table = np.random.default_rng(0).normal(5, 3, (6, 3))
    outputs = 3 if kind is TabularClassification else 1
    return kind(
        lambda: nn.Linear(3, outputs),
        (table, [0, 1, 2, 0, 1, 2]),
        feature_names=("age", "height", "weight"),
        mean=table.mean(0),
        std=table.std(0),
    )


HOUSES = [[41.0, 3.0, "INLAND"], [None, 5.0, "ISLAND"], [12.5, float("nan"), "INLAND"], [7.0, 1.0, "BAY"]]
PRICES = [120_000.0, 450_000.0, 90_000.0, 300_000.0]


def house_task(**changes: Any) -> TabularRegression:
    options = {
        "feature_names": ("age", "rooms", "place"),
        "categories": {"place": ("BAY", "INLAND", "ISLAND")},
        "fill": {"age": 20.0, "rooms": 4.0},
        "mean": (20.0, 3.0),
        "std": (10.0, 2.0),
        "label_mean": 200_000.0,
        "label_std": 100_000.0,
        **changes,
    }
    return TabularRegression(lambda: nn.Linear(5, 1), (HOUSES, PRICES), **options)


class Average(nn.Module):
    """Mean of the token embeddings, padding left out, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask[:, :, None].float()
        pooled: Tensor = (self.embedding(ids) * weights).sum(1) / weights.sum(1)
        output: Tensor = self.head(pooled)
        return output


TEXTS = [[3, 4], [5, 6, 7, 8], [9], [1, 2, 3]]


def text_task(**options: Any) -> TextClassification:
    return TextClassification(Average, (TEXTS, [0, 1, 2, 0]), vocabulary_size=50, class_names=NAMES, **options)


WRITTEN = ["Two cats", "a DOG, once", "ships!"]


def written_task(**options: Any) -> TextClassification:
    vocabulary = Vocabulary(WRITTEN, 50)
    return TextClassification(
        Average,
        (WRITTEN, [0, 1, 2]),
        vocabulary_size=50,
        class_names=NAMES,
        encode=lambda text: vocabulary.encode(text, 8),
        **options,
    )


def encode(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def decode(ids: list[int]) -> str:
    return "".join(chr(one + ord("a")) for one in ids)


def file(array: Any, kind: str = "PNG", mode: str | None = None) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def assert_equal_examples(one: Any, other: Any) -> None:
    if isinstance(one[0], str):
        assert one[0] == other[0]
    else:
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=0, equal_nan=True)
    assert one[1] == other[1]
    assert type(one[1]) is type(other[1])


ALL_TASKS = {
    "rgb": image_task,
    "grey": lambda: image_task(1),
    "table classes": lambda: table_task(TabularClassification),
    "table values": lambda: table_task(TabularRegression),
    "table with categories and gaps": house_task,
    "token ids": text_task,
    "written text": written_task,
    "text": lambda: text_task(encode=encode, decode=decode),
}


@pytest.mark.parametrize("kind", ALL_TASKS)
def test_what_is_rendered_parses_to_the_same_example(kind: str) -> None:
    task = ALL_TASKS[kind]()
    for row in range(len(task.train)):
        example = task.train[row]
        payload = json.loads(json.dumps(task.render(example)))
        assert_equal_examples(task.parse({**payload, "label": task.label(example)}), example)
        unlabelled = task.parse(payload)
        assert task.label(unlabelled) is None
        assert_equal_examples(task.with_label(unlabelled, example[1]), example)


@pytest.mark.parametrize("kind", ALL_TASKS)
def test_rows_fetched_together_are_the_rows_fetched_one_by_one(kind: str) -> None:
    task = ALL_TASKS[kind]()
    rows = [1, 0, 2]
    fetched = DataLoader(task.train, batch_sampler=[rows], collate_fn=lambda examples: examples)
    for row, example in zip(rows, next(iter(fetched)), strict=True):
        assert_equal_examples(example, task.train[row])


@pytest.mark.parametrize("kind", ALL_TASKS)
def test_losses_and_predictions_are_one_an_example_and_alike_in_any_batch(kind: str) -> None:
    task = ALL_TASKS[kind]()
    torch.manual_seed(0)
    model = task.model()
    examples = [task.train[row] for row in range(len(task.train))]
    losses = task.loss(model, task.collate(examples))
    predictions = task.predict(model, task.collate(examples))
    assert losses.shape == (len(examples),)
    is_regression = isinstance(task, TabularRegression)
    assert predictions.shape == ((len(examples),) if is_regression else (len(examples), 3))
    for row, example in enumerate(examples):
        torch.testing.assert_close(task.loss(model, task.collate([example])), losses[row : row + 1])
        torch.testing.assert_close(task.predict(model, task.collate([example])), predictions[row : row + 1])


def test_the_losses_are_cross_entropy_and_squared_error() -> None:
    for kind, reference in ((TabularClassification, F.cross_entropy), (TabularRegression, F.mse_loss)):
        task = table_task(kind)
        model = task.model()
        batch = task.collate([task.train[row] for row in range(6)])
        torch.testing.assert_close(task.loss(model, batch).mean(), reference(task.predict(model, batch), batch[1]))


def test_images_are_normalised_by_channel() -> None:
    task = image_task()
    pixels = images(7, 3)
    expected = (pixels[2].astype(np.float64) / 255 - MEAN) / STD  # [height, width, channels]
    image, label = task.train[2]
    assert image.shape == (3, 5, 4)
    assert image.is_contiguous()
    assert label == 2
    np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_tables_are_scaled_in_the_batch_only() -> None:
    task = table_task(TabularRegression)
    features, labels = task.collate([task.train[row] for row in range(6)])
    torch.testing.assert_close(features.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(3))
    assert labels.dtype == torch.float32


def test_gaps_are_filled_numbers_scaled_and_categories_expanded_in_the_batch_only() -> None:
    task = house_task()
    inputs, labels = task.collate([task.train[row] for row in range(4)])
    expected = [[2.1, 0.0, 0, 1, 0], [0.0, 1.0, 0, 0, 1], [-0.75, 0.5, 0, 1, 0], [-1.3, -1.0, 1, 0, 0]]
    torch.testing.assert_close(inputs, torch.tensor(expected))
    assert labels.tolist() == PRICES
    assert task.render(task.train[1]) == {"features": {"age": None, "rooms": 5.0, "place": "ISLAND"}}


def test_labels_are_scaled_for_the_model_and_predictions_are_in_their_unit() -> None:
    task = house_task()
    model = task.model()
    batch = task.collate([task.train[row] for row in range(4)])
    output = model(batch[0])[:, 0]
    torch.testing.assert_close(task.predict(model, batch), output * 100_000 + 200_000)
    scaled = (torch.tensor(PRICES) - 200_000) / 100_000
    torch.testing.assert_close(task.loss(model, batch), (output - scaled).square())


def test_a_vocabulary_numbers_words_by_frequency_then_spelling() -> None:
    vocabulary = Vocabulary(["B b, a", "c! a b"], 6)
    assert vocabulary.ids == {"b": 2, "a": 3, "!": 4, ",": 5}
    assert vocabulary.encode("A c b!", 9) == [3, 1, 2, 4]
    assert vocabulary.encode("A c b!", 2) == [3, 1]


def test_written_texts_take_token_ids_too() -> None:
    task = written_task()
    ids = task.parse({"token_ids": [2, 3]})
    (batch, mask), _ = task.collate([task.with_label(ids, 0), task.train[1]])
    assert batch[0].tolist() == [2, 3, 0, 0]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


@given(pixels=hnp.arrays(np.uint8, (5, 4, 3)), label=st.sampled_from([None, 0, 2, "cat", "ship"]))
def test_any_pixels_come_back_by_every_road(pixels: Any, label: Any) -> None:
    task = image_task()
    encoded = file(pixels)
    for image in (encoded, "data:image/png;base64," + encoded, encoded[:9] + "\n " + encoded[9:], pixels.tolist()):
        example = task.parse({"image": image, "label": label})
        assert np.array_equal(task.normalise.inverse(example[0]), pixels)
        assert example[1] == (NAMES.index(label) if isinstance(label, str) else label)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_any_numbers_come_back_from_a_table(values: list[float]) -> None:
    task = table_task(TabularRegression)
    payload = {"features": dict(zip(task.feature_names, values, strict=True)), "label": -0.5}
    example = task.parse(payload)
    again = task.parse({**json.loads(json.dumps(task.render(example))), "label": -0.5})
    assert_equal_examples(example, again)
    assert example[0].tolist() == values


@given(st.lists(st.integers(0, 49), min_size=1, max_size=512))
def test_any_token_ids_come_back(ids: list[int]) -> None:
    task = text_task()
    example = task.parse({"token_ids": ids, "label": 1})
    assert task.render(example) == {"token_ids": ids}


def test_numbers_are_shown_as_short_as_they_are() -> None:
    task = table_task(TabularRegression)
    features = {"age": 41.0, "height": 0.1, "weight": 1e-20}
    assert task.render(task.parse({"features": features})) == {"features": features}


def test_jpeg_and_other_colour_modes_are_converted() -> None:
    grey = np.full((5, 4), 120, np.uint8)
    task = image_task()
    for kind, mode in (("JPEG", None), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA")):
        pixels = task.normalise.inverse(task.parse({"image": file(grey, kind, mode)})[0])
        assert np.abs(pixels.astype(int) - 120).max() <= 2, (kind, mode)
    colours = np.stack([grey] * 3, axis=2)
    assert np.array_equal(
        image_task(1).normalise.inverse(image_task(1).parse({"image": file(colours)})[0])[..., 0], grey
    )


def bomb(width: int, height: int) -> str:
    """A PNG that is small as a file and says that it is enormous."""
    content = bytearray(base64.b64decode(file(np.zeros((5, 4), np.uint8))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return base64.b64encode(content).decode()


GOOD = images(1, 3)[0]
BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "nothing": ({}, '"image" is a base64 PNG or JPEG'),
    "null": ({"image": None}, '"image" is a base64 PNG or JPEG'),
    "a number": ({"image": 3}, '"image" is a base64 PNG or JPEG'),
    "no base64": ({"image": "what?!"}, "not base64 text"),
    "letters beyond ASCII": ({"image": "äöü"}, "not base64 text"),
    "a web address": ({"image": "data:text/html,<b>"}, "not a base64 data URL"),
    "no image": ({"image": base64.b64encode(b"not an image").decode()}, "is not a PNG or JPEG"),
    "empty": ({"image": ""}, "is not a PNG or JPEG"),
    "cut short": ({"image": file(GOOD)[:100]}, "lacks the end of its file"),
    "a JPEG cut short": ({"image": file(GOOD, "JPEG")[:400]}, "lacks the end of its file"),
    "a GIF": ({"image": file(GOOD, "GIF")}, "is not a PNG or JPEG"),
    "a BMP": ({"image": file(GOOD, "BMP")}, "is not a PNG or JPEG"),
    "many letters apart": ({"image": "A " * (8 << 20)}, "far more than its pixels"),
    "too large": ({"image": file(np.zeros((6, 4, 3), np.uint8))}, "4 wide and 6 high, the task's images 4 and 5"),
    "a turned one": ({"image": file(np.zeros((4, 5, 3), np.uint8))}, "5 wide and 4 high"),
    "16 bits": ({"image": file(np.zeros((5, 4), np.uint16))}, "more than 8 bits"),
    "a bomb": ({"image": bomb(60_000, 60_000)}, "cannot be decoded"),
    "a smaller bomb": ({"image": bomb(12_000, 12_000)}, '"image"'),
    "too long": ({"image": "A" * (17 << 20)}, "more than the"),
    "ragged lists": ({"image": [[1, 2], [3]]}, "shape is [2]"),
    "lists of another shape": ({"image": GOOD.tolist()[:-1]}, "[4, 4, 3]"),
    "grey lists for colours": ({"image": GOOD[..., 0].tolist()}, "[5, 4]"),
    "fractions": ({"image": (GOOD / 255).tolist()}, "holds values that are not pixels"),
    "beyond 255": ({"image": (GOOD.astype(int) + 256).tolist()}, "holds values that are not pixels"),
    "not a number": ({"image": np.full((5, 4, 3), np.nan).tolist()}, "holds values that are not pixels"),
    "huge numbers": ({"image": np.full((5, 4, 3), 10**30, dtype=object).tolist()}, "holds values that are not pixels"),
    "a long word in lists": ({"image": [["a" * 100_000] + [""] * 50_000]}, "shape is"),
    "words in lists": ({"image": np.full((5, 4, 3), "a").tolist()}, "holds values that are not pixels"),
    "truth values": ({"image": np.full((5, 4, 3), True).tolist()}, "holds values that are not pixels"),
    "objects in lists": ({"image": [{}]}, "shape is [1]"),
    "an unknown key": ({"image": GOOD.tolist(), "imgae": 1}, "has no imgae; it takes image, label"),
    "no object": ([GOOD.tolist()], "is a JSON object"),
    "label too large": ({"image": GOOD.tolist(), "label": 3}, "from 0 to 2"),
    "label below 0": ({"image": GOOD.tolist(), "label": -1}, "from 0 to 2"),
    "label true": ({"image": GOOD.tolist(), "label": True}, "from 0 to 2"),
    "label of a fraction": ({"image": GOOD.tolist(), "label": 1.5}, "from 0 to 2"),
    "label of another name": ({"image": GOOD.tolist(), "label": "frog"}, "one of cat, dog, ship"),
    "label a list": ({"image": GOOD.tolist(), "label": [1]}, "from 0 to 2"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case: str) -> None:
    payload, message = BAD_IMAGES[case]
    with pytest.raises(QueryError) as caught:
        image_task().parse(payload)
    assert message in str(caught.value)


def numbers(**changes: Any) -> dict[str, Any]:
    features = {"age": 1, "height": 2.5, "weight": 3, **changes}
    return {"features": {name: value for name, value in features.items() if value is not ...}}


BAD_TABLES: dict[str, tuple[Any, str]] = {
    "nothing": ({}, '"features" is an object'),
    "a list": ({"features": [1, 2, 3]}, '"features" is an object'),
    "one missing": (numbers(age=...), "missing: age"),
    "one unknown": (numbers(shoe=44), "unknown: shoe"),
    "misspelt": (numbers(age=..., aeg=3), "missing: age; unknown: aeg"),
    "null": (numbers(age=None), "feature age is None"),
    "a word": (numbers(age="41"), "feature age is '41'"),
    "a truth value": (numbers(age=True), "feature age is True"),
    "not a number": (numbers(age=float("nan")), "feature age is nan"),
    "infinite": (numbers(age=float("-inf")), "feature age is -inf"),
    "too large": (numbers(age=1e39), "feature age is 1e+39"),
    "a huge whole number": (numbers(age=10**400), "feature age is 1000"),
    "a number of too many digits": (numbers(age=10**5000), "feature age is an enormous int"),
    "a list for a number": (numbers(age=list(range(1000))), "feature age is [0, 1, 2"),
    "label a word": ({**numbers(), "label": "high"}, "finite number"),
    "label not a number": ({**numbers(), "label": float("nan")}, "finite number"),
    "label a huge whole number": ({**numbers(), "label": 10**400}, "finite number"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused(case: str) -> None:
    payload, message = BAD_TABLES[case]
    with pytest.raises(QueryError) as caught:
        table_task(TabularRegression).parse(payload)
    assert message in str(caught.value)


BAD_HOUSES: dict[str, tuple[Any, str]] = {
    "an unknown category": ({"place": "MARS"}, "feature place is 'MARS'; give one of BAY, INLAND, ISLAND"),
    "a category as a number": ({"place": 1}, "feature place is 1; give one of"),
    "a category not known": ({"place": None}, "feature place is None; give one of"),
    "a list for a category": ({"place": ["BAY"]}, "feature place is ['BAY']; give one of"),
    "a word for a number": ({"age": "old"}, "give a finite number, or null where it is not known"),
}


@pytest.mark.parametrize("case", BAD_HOUSES)
def test_bad_categories_and_gaps_are_refused(case: str) -> None:
    changes, message = BAD_HOUSES[case]
    with pytest.raises(QueryError) as caught:
        house_task().parse({"features": {"age": 1, "rooms": 2, "place": "BAY", **changes}})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": {"age": 20.0}}, "rooms has missing or infinite values; for missing ones give fill={'rooms': number}"),
        ({"categories": {"place": ("BAY", "INLAND")}}, "place has 'ISLAND', which its categories lack"),
    ],
)
def test_tables_with_unlisted_words_or_gaps_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        train_of(house_task(**changes))


BAD_TEXTS: dict[str, tuple[Any, str]] = {
    "nothing": ({}, 'either "text" or "token_ids"'),
    "both": ({"text": "ab", "token_ids": [1]}, 'either "text" or "token_ids"'),
    "a number": ({"text": 3}, '"text" is a string'),
    "empty text": ({"text": ""}, "0 tokens"),
    "too long a text": ({"text": "a" * 513}, "513 tokens; give 1 to 512"),
    "enormous": ({"text": "a" * 2_000_000}, "more than the"),
    "words for ids": ({"token_ids": ["a"]}, "whole numbers"),
    "truth values": ({"token_ids": [True]}, "whole numbers"),
    "no list": ({"token_ids": "abc"}, "whole numbers"),
    "empty ids": ({"token_ids": []}, "0 tokens"),
    "outside the vocabulary": ({"token_ids": [1, 50]}, "token id 50 is outside"),
    "below zero": ({"token_ids": [-1]}, "token id -1 is outside"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_refused(case: str) -> None:
    payload, message = BAD_TEXTS[case]
    with pytest.raises(QueryError) as caught:
        text_task(encode=encode).parse(payload)
    assert message in str(caught.value)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(QueryError, match="has no tokenizer"):
        text_task().parse({"text": "abc"})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


FUZZED = (
    (image_task(), "image"),
    (table_task(TabularRegression), "features"),
    (text_task(encode=encode), "text"),
    (written_task(), "text"),
)


@given(JSON)
def test_whatever_json_comes_the_answer_is_an_example_or_a_query_error(value: Any) -> None:
    for task, key in FUZZED:
        for payload in (value, {key: value}, {key: value, "label": value}, {"token_ids": value}):
            with contextlib.suppress(QueryError):
                task.collate([task.with_label(task.parse(payload), 0)])


@given(st.binary(max_size=300))
def test_whatever_bytes_come_as_an_image_the_answer_is_a_query_error(content: bytes) -> None:
    for head in (b"", b"\xff\xd8\xff", base64.b64decode(file(GOOD))[:26]):
        with pytest.raises(QueryError):
            FUZZED[0][0].parse({"image": base64.b64encode(head + content).decode()})


def test_labels_without_names_are_held_to_the_models_outputs() -> None:
    task = image_task(class_names=None)
    assert task.parse({"image": GOOD.tolist(), "label": 2})[1] == 2
    with pytest.raises(QueryError, match="from 0 to 2"):
        task.parse({"image": GOOD.tolist(), "label": 3})
    with pytest.raises(QueryError, match="have no names"):
        task.parse({"image": GOOD.tolist(), "label": "cat"})


def test_data_comes_as_arrays_a_data_set_or_a_function_called_once() -> None:
    calls = []

    def load() -> tuple[Any, Any]:
        calls.append(1)
        return images(4, 1), [0, 1, 2, 0]

    dataset = [(torch.rand(1, 5, 4), row % 3) for row in range(4)]
    task = image_task(1)
    lazy = ImageClassification(task.model, load, query=lambda: dataset)
    assert not calls
    assert lazy.query is dataset
    assert len(lazy.train) == len(lazy.train) == 4
    assert calls == [1]
    from_dataset = ImageClassification(task.model, dataset)
    assert from_dataset.train is dataset
    assert from_dataset.query is None
    assert from_dataset.render(dataset[0])["image"].startswith("data:image/png;base64,")


def train_of(task: Any) -> Any:
    return task.train


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((2, 5, 4), np.float32), [0, 1]), "give uint8"),
        ((np.zeros((2, 5), np.uint8), [0, 1]), "give uint8"),
        ((np.zeros((2, 5, 4), np.uint8), [0]), "2 images and 1 labels"),
    ],
)
def test_image_arrays_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        train_of(ImageClassification(nn.Flatten, data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([[1.0, np.nan]], [0]), "b has missing or infinite values"),
        (([[1.0]], [0]), "one column a feature name"),
        (([[1.0, 2.0]], [0, 1]), "1 rows of features and 2 labels"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        train_of(TabularClassification(nn.Flatten, data, feature_names=("a", "b")))


@pytest.mark.parametrize(
    ("data", "message"), [(([[1], []], [0, 1]), "row 1 has no token"), (([[1]], [0, 1]), "1 texts and 2 labels")]
)
def test_texts_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        train_of(TextClassification(Average, data, vocabulary_size=9))
