from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import mostly_long
from gradtrace.checkpoints import Checkpoint, load_checkpoints, load_into
from gradtrace.errors import DatasetError
from gradtrace.results.hits import Hit, InfluenceResult
from gradtrace.tasks.language import TaskFile, task_file_text
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import load_task
from shortened_examples import EXAMPLES, example, needs_data, shortened, trained_index

ROWS = {
    "digits": (1_500, 297),
    "mnist": (60_000, 10_000),
    "mnist6k": (6_000, 300),
    "cifar10": (50_000, 10_000),
    "california": (16_512, 4_128),
    "dbpedia": (9_861, 7_600),
    "sst2": (6_920, 872),
}
FILES = {
    "mnist": "mnist-train.npz",
    "mnist6k": "mnist-train.npz",
    "cifar10": "cifar10-train.npz",
    "california": "california_housing.csv",
    "dbpedia": "dbpedia14-train.jsonl.gz",
    "sst2": "sst2-train-sentences.jsonl.gz",
}


@pytest.mark.recipe
def test_the_digits_example_trains_a_model_that_its_checkpoints_give_back(tmp_path: Path) -> None:
    task = example("digits")
    trained = runpy.run_path(str(EXAMPLES / "digits/train.py"))
    accuracy = trained["train"](task, tmp_path, epochs=5)
    assert accuracy > 0.85
    checkpoints = load_checkpoints(tmp_path / "checkpoints")
    assert [one.step for one in checkpoints] == [30, 60, 90, 120, 150]
    rates = [one.learning_rate for one in checkpoints]
    assert rates == sorted(rates, reverse=True)
    model = task.model()
    load_into(model, checkpoints[-1])
    assert trained["evaluate"](task, model.eval()) == accuracy


@pytest.mark.recipe
@pytest.mark.long
def test_a_training_script_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits/train.py"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "epoch 10 of 10" in done.stdout
    assert len(load_checkpoints(tmp_path / "run/checkpoints")) == 5


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("digits", 5_000, 20_000),
        ("mnist", 235_000, 245_000),
        ("mnist6k", 105_000, 112_000),
        ("cifar10", 138_000, 145_000),
        ("california", 12_000, 13_000),
        ("dbpedia", 1_285_000, 1_295_000),
        ("sst2", 705_000, 715_000),
    ],
)
def test_the_models_are_of_the_stated_size(name: str, least: int, most: int) -> None:
    model = example(name).model()
    assert least <= sum(weight.numel() for weight in model.parameters()) <= most


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        *(pytest.param(name, marks=needs_data) for name in ("mnist6k", "cifar10")),
        pytest.param("mnist", marks=[needs_data, pytest.mark.long]),
    ],
)
def test_the_tasks_give_their_data_losses_and_pictures(name: str) -> None:
    task = example(name)
    assert (len(task.train), len(task.query)) == ROWS[name]
    rows = list(range(0, len(task.train), len(task.train) // 64))
    examples = task.train.__getitems__(rows)
    inputs, labels = batch = task.collate(examples)
    assert inputs.dtype == torch.float32
    assert set(labels.tolist()) == set(range(10))
    assert float(inputs.mean().abs()) < 0.5
    assert task.loss(task.model().eval(), batch).shape == (len(rows),)
    for row, fetched in zip(rows[:3], examples, strict=False):
        assert torch.equal(task.train[row][0], fetched[0])
        parsed = task.parse({**task.render(fetched), "label": task.label_name(task.label(fetched))})
        assert torch.equal(parsed[0], fetched[0])
        assert parsed[1] == fetched[1]


@needs_data
@pytest.mark.recipe
@pytest.mark.parametrize("name", mostly_long(["california", "dbpedia", "sst2"], "california"))
def test_an_index_of_an_example_agrees_with_exact_gradients(name: str, tmp_path: Path) -> None:
    task = shortened(name, 128)
    index = trained_index(name, task, tmp_path, epochs=3)
    checkpoints = load_checkpoints(tmp_path / "checkpoints")[-2:]
    queries = [task.query[row] for row in range(6)]
    exact = sum(one.learning_rate * inner_products(task, one, queries) for one in checkpoints)  # [queries, rows]
    for scores, expected in zip(index.scores(queries), exact, strict=True):
        assert np.corrcoef(scores, expected)[0, 1] > 0.95


def inner_products(task: Any, checkpoint: Checkpoint, queries: list[Any]) -> Any:
    """Of whole gradients, by plain autograd, one example at a time. [queries, rows]"""
    model = task.model().eval()
    load_into(model, checkpoint)

    def gradient(item: Any) -> torch.Tensor:
        loss = task.loss(model, task.collate([item])).sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    wanted = torch.stack([gradient(item) for item in queries])
    return torch.stack([wanted @ gradient(task.train[row]) for row in range(len(task.train))], 1).numpy()


@needs_data
@pytest.mark.recipe
def test_mnist6k_is_retrained_alike_from_the_same_seed_and_measures_margins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "mnist6k")
    monkeypatch.delitem(sys.modules, "task", raising=False)
    trained = runpy.run_path(str(EXAMPLES / "mnist6k/train.py"))
    task = trained["TASK"]
    monkeypatch.delitem(sys.modules, "task")
    rows = range(0, 6_000, 10)
    models = [task.fit(rows, seed).eval() for seed in (1, 1, 2)]
    batch = task.collate(task.query.__getitems__(range(40)))
    margins = [-task.measurement(model, batch) for model in models]
    assert torch.equal(margins[0], margins[1])
    assert not torch.equal(margins[0], margins[2])
    chances = models[0](batch[0]).double().softmax(1)  # float32 would round what is left to the wrong classes away
    right = chances.gather(1, batch[1][:, None])[:, 0]
    wrong = chances.scatter(1, batch[1][:, None], 0).sum(1)
    torch.testing.assert_close(margins[0].double(), (right / wrong).log(), rtol=1e-5, atol=1e-5)
    assert trained["evaluate"](task, models[0]) > 0.8
    task.train = [task.train[row] for row in range(256)]
    trained["train"](task, tmp_path, seed=3)
    assert [one.step for one in load_checkpoints(tmp_path / "checkpoints")] == [12, 24, 36, 48, 60, 72]


@needs_data
@pytest.mark.parametrize("name", ["dbpedia", "sst2"])
def test_padding_changes_no_loss(name: str) -> None:
    task = example(name)
    torch.manual_seed(0)
    model = task.model().eval()
    items = [task.train[row] for row in range(12)]
    together = task.loss(model, task.collate(items))
    alone = torch.cat([task.loss(model, task.collate([item])) for item in items])
    torch.testing.assert_close(together, alone)


@needs_data
@pytest.mark.parametrize("name", ["california", "dbpedia", "sst2"])
def test_what_is_rendered_is_read_again(name: str) -> None:
    task = example(name)
    for row in (0, 5, len(task.query) - 1):
        item = task.query[row]
        rendered = json.loads(json.dumps(task.render(item)))
        assert task.render(task.parse(rendered)) == rendered


@needs_data
def test_california_knows_missing_bedrooms_and_prices_in_dollars() -> None:
    task = example("california")
    gaps = [row for row in range(len(task.train)) if task.train[row][0].isnan().any()]
    assert 100 < len(gaps) < 207
    assert task.render(task.train[gaps[0]])["features"]["total_bedrooms"] is None
    inputs, prices = task.collate([task.train[row] for row in range(len(task.train))])
    assert inputs.shape[1] == 13
    torch.testing.assert_close(inputs[:, :8].mean(0), torch.zeros(8), atol=0.01, rtol=0)
    torch.testing.assert_close(inputs[:, :8].std(0), torch.ones(8), atol=0.01, rtol=0)
    assert abs(float(prices.mean()) - task.label_mean) < 1
    assert abs(float(prices.std()) - task.label_std) < 10


@needs_data
@pytest.mark.recipe
def test_the_map_of_comparables_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    task = example("california")
    monkeypatch.syspath_prepend(EXAMPLES / "california")
    monkeypatch.delitem(sys.modules, "task", raising=False)
    draw = runpy.run_path(str(EXAMPLES / "california/map.py"))["draw"]
    monkeypatch.delitem(sys.modules, "task")
    hits = [Hit(row, 1.0, {}, task.train[row][1], 1e5, 0.1, None) for row in range(5)]
    result = InfluenceResult(hits[:2], hits[2:], "tracin", "loss", 2e5, 2.1e5, 0.1, True, None, 5, 5)
    draw(result, task.query[0][0][:2].numpy(), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FILES)
def test_without_data_the_message_names_the_variable_and_the_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRADTRACE_DATA", raising=False)
    with pytest.raises(DatasetError, match=rf"{FILES[name]} is needed; set GRADTRACE_DATA"):
        len(example(name).train)
    monkeypatch.setenv("GRADTRACE_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=rf"{FILES[name]} is not in .*; set GRADTRACE_DATA"):
        len(example(name).train)


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    augment = runpy.run_path(str(EXAMPLES / "cifar10/train.py"))["augment"]
    torch.manual_seed(0)
    image = torch.arange(3 * 9 * 9, dtype=torch.float32).reshape(1, 3, 9, 9)
    inner = slice(4, -4)  # what no shift of 2 pixels moves beyond the centre's neighbourhood
    seen = set()
    for moved in augment(image.expand(2_000, -1, -1, -1)):
        row, column = divmod(int(moved[0, 4, 4]), 9)
        step = int(moved[0, 4, 5] - moved[0, 4, 4])
        seen.add((row - 4, column - 4, step))
        assert moved[:, inner, inner].flatten().tolist() == [moved[0, 4, 4], moved[0, 4, 4] + 81, moved[0, 4, 4] + 162]
        assert moved[0, 5, 4] - moved[0, 4, 4] == 9
    assert seen == {(down, right, step) for down in range(-2, 3) for right in range(-2, 3) for step in (-1, 1)}


@needs_data
def test_the_language_example_leaves_a_model_and_its_data(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    runpy.run_path(str(EXAMPLES / "wikitext/train.py"))["train"](tmp_path, rows=24, epochs=2)
    file = TaskFile(model=tmp_path / "model", data=tmp_path / "train.jsonl", query_data=tmp_path / "query.jsonl")
    (tmp_path / "task.json").write_text(task_file_text(file))
    task, checkpoints = load_task(str(tmp_path / "task.json")), load_checkpoints(tmp_path / "model")
    assert [len(task.train), [one.step for one in checkpoints]] == [24, [2, 4]]
    index = build_index(task, checkpoints, tmp_path / "index", progress=False)
    assert index.manifest.basis.kind == "sparse"
    (answer,) = index.influence([task.train[3]], k=1, method="influence")
    assert answer.proponents[0].row == 3
