"""What is known of a model's outputs: labels for the curvature, predictions, classifiers with one output."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from conftest import mostly_long
from gradtrace import Index, QueryError, RowFilter, StoreError, Task, TaskError, open_index
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.outputs import Outputs
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import add_kernels
from gradtrace_indexer.description import details
from gradtrace_service.answers.documents import convention
from tiny import ClassTask, PairTask, ValueTask

Predict = Callable[[nn.Module, Any], Tensor]
CPU = torch.device("cpu")
ROWS = tiny.classes(40)
INPUTS = [x for x, _ in ROWS]
BINARY = [(x, float(label > 0)) for x, label in ROWS]


def task_of(
    rows: Sequence[Any], make: Callable[[], nn.Module], loss: tiny.Loss, predict: Predict | None = None, **more: Any
) -> Task:
    body = {"predict": lambda self, model, batch: predict(model, batch)} if predict is not None else {}
    kind = type("Made", (PairTask,), body | more)
    task: Task = kind(make, rows, loss)
    return task


def outputs_of(task: Task, directory: Path) -> Outputs:
    (checkpoint,) = tiny.checkpoints(task, directory, 1)
    return GradientModel(task, checkpoint, CPU, [task.train[row] for row in range(6)]).outputs


def exact(task: Task, directory: Path, queries: Sequence[Any]) -> Tensor:
    """Inner products of gradients at the one checkpoint, by autograd, one example at a time. [queries, rows]"""
    model = tiny.loaded(task, tiny.checkpoints(task, directory, 1)[0])

    def gradient(example: Any) -> Tensor:
        (loss,) = task.loss(model, task.collate([example]))
        return torch.cat([own.flatten() for own in torch.autograd.grad(loss, list(model.parameters()))]).double()

    rows, asked = (torch.stack([gradient(example) for example in part]) for part in (task.train, queries))
    return asked @ rows.T


def first(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def one_logit() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def sigmoid() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 1), nn.Sigmoid(), nn.Flatten(0))


def binary_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(first(model, batch), batch[1].float(), reduction="none")


def probability_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy(first(model, batch), batch[1].float(), reduction="none")


# Labels of many kinds


def log_loss(model: nn.Module, batch: Any) -> Tensor:
    return (first(model, batch) - batch[1].float().log()) ** 2


def class_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(first(model, batch), batch[1], reduction="none")


def many_labels_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(first(model, batch), batch[1], reduction="none").mean(1)


WORDS = ["cat", "dog", "owl"]


def word_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(
        first(model, batch), torch.tensor([WORDS.index(word) for word in batch[1]]), reduction="none"
    )


def dict_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def triple_loss(model: nn.Module, batch: Any) -> Tensor:
    return batch[2] * F.cross_entropy(model(batch[0]), batch[1], reduction="none")


SOFT = [(x, F.one_hot(torch.tensor(label), 3).float() * 0.8 + 0.2 / 3) for x, label in ROWS]
MANY = [(x, (x[:3] > 0).float()) for x in INPUTS]
PREDICTED = {
    "sigmoid and binary_cross_entropy": (BINARY, sigmoid, probability_loss, first),
    "logarithm of a positive target": (
        [(x, float(x.abs().sum())) for x in INPUTS],
        one_logit,
        log_loss,
        lambda model, batch: first(model, batch).exp(),
    ),
    "one-hot and mixed labels": (SOFT, tiny.mlp, class_loss, first),
    "several labels": (MANY, tiny.mlp, many_labels_loss, first),
    "words": ([(x, WORDS[label]) for x, label in ROWS], tiny.mlp, word_loss, first),
    "dicts": ([{"x": x, "y": label} for x, label in ROWS], tiny.mlp, dict_loss, lambda model, batch: model(batch["x"])),
    "triples": ([(x, label, 1.0 + label) for x, label in ROWS], tiny.mlp, triple_loss, first),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_labels_of_any_kind(name: str, tmp_path: Path) -> None:
    """With the default basis, with predictions and without."""
    rows, make, loss, predict = PREDICTED[name]
    for number, task in enumerate((task_of(rows, make, loss, predict), task_of(rows, make, loss))):
        index = tiny.build(task, tmp_path / str(number), 1, basis="spectral")
        assert index.manifest.fisher is not None
        assert index.manifest.fisher.source == "loss"
        found = torch.from_numpy(index.scores(rows[:3])).double()
        wanted = exact(task, tmp_path / str(number) / "checkpoints", rows[:3])
        for scores, products in zip(found, wanted, strict=True):
            assert float(torch.corrcoef(torch.stack([scores, products]))[0, 1]) > 0.9999
        assert np.isfinite(index.scores(rows[:3], method="influence")).all()


def pixel_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(first(model, batch), batch[1], reduction="none").mean((1, 2))


def test_predictions_of_every_pixel_are_refused_and_not_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [(torch.randn(3, 6, 6), torch.randint(2, (6, 6))) for _ in range(24)]

    def make() -> nn.Module:
        return nn.Conv2d(3, 2, 3, padding=1)

    for basis in ("none", "spectral"):
        with pytest.raises(TaskError, match=r"predict returns shape .*\[batch, classes\] scores.*leave predict out"):
            tiny.build(task_of(rows, make, pixel_loss, first), tmp_path / basis, 1, basis=basis)
    task = task_of(rows, make, pixel_loss)
    index = tiny.build(task, tmp_path / "without", 1, basis="spectral")
    found = torch.from_numpy(index.scores(rows[:3])).double() / 0.1  # the learning rate
    wanted = exact(task, tmp_path / "without" / "checkpoints", rows[:3])
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=1e-3)
    assert index.manifest.fisher is not None
    assert index.manifest.fisher.description == (
        "several labels an example: categorical over 2 classes (cross_entropy), labels drawn"
    )


def test_a_predict_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="predict fails on training rows: ZeroDivisionError"):
        tiny.build(task_of(ROWS, tiny.mlp, class_loss, lambda model, batch: 1 / 0), tmp_path)


# Classifiers with one output


def two_columns(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def two_column_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(two_columns(model, batch), batch[1].long(), reduction="none")


ONE_COLUMN: dict[str, tuple[Any, Any, Predict | None]] = {
    "logits": (one_logit, binary_loss, first),
    "logits, a column": (one_logit, binary_loss, lambda model, batch: first(model, batch)[:, None]),
    "probabilities": (one_logit, binary_loss, lambda model, batch: first(model, batch).sigmoid()),
    "classes": (one_logit, binary_loss, lambda model, batch: first(model, batch) > 0),
    "two columns": (one_logit, binary_loss, two_columns),
    "no predict": (one_logit, binary_loss, None),
}


@pytest.mark.parametrize("name", mostly_long(ONE_COLUMN, "logits", "classes", "two columns"))
def test_a_classifier_with_one_output_is_the_one_with_two(name: str, tmp_path: Path) -> None:
    make, loss, predict = ONE_COLUMN[name]
    whole = [(x, int(label)) for x, label in BINARY]
    task = task_of(BINARY, make, loss, predict)
    index = tiny.build(task, tmp_path / "one", basis="spectral")
    other = tiny.build(task_of(whole, one_logit, two_column_loss, two_columns), tmp_path / "two", basis="spectral")
    for column in ("label", "prediction", "correct"):
        np.testing.assert_array_equal(index.columns[column], other.columns[column])
    assert index.columns["label"].dtype == np.int64
    indexes = [_with_kernels(index, tmp_path / "one"), _with_kernels(other, tmp_path / "two")]
    for method in ("tracin", "influence", "source", "trak"):
        scores = [own.scores(rows[:5], method=method) for own, rows in zip(indexes, (BINARY, whole), strict=True)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=0.02, atol=2e-3 * np.abs(scores[1]).max())
    results = indexes[0].influence([BINARY[0], (INPUTS[1], None)], k=3, filter=RowFilter(labels=[1]))
    assert {hit.label for hit in (*results[0].proponents, *results[0].opponents)} == {1}
    right = indexes[0].influence([BINARY[0]], k=3, filter=RowFilter(correct_only=True))[0]
    assert all(hit.correct and hit.label == hit.prediction for hit in (*right.proponents, *right.opponents))
    assert (type(results[0].label), results[0].label) == (int, int(BINARY[0][1]))
    assert results[1].target == "loss at the predicted label"
    assert results[1].prediction == index.columns["prediction"][1]


def _with_kernels(index: Index, directory: Path) -> Index:
    add_kernels(directory / "index", progress=False)
    return open_index(directory / "index", index.task)


def test_probabilities_of_a_sigmoid_are_classes(tmp_path: Path) -> None:
    for number, predict in enumerate((first, None)):
        index = tiny.build(task_of(BINARY, sigmoid, probability_loss, predict), tmp_path / str(number), 1)
        model = tiny.loaded(index.task, tiny.checkpoints(index.task, tmp_path / "again", 1)[0])
        wanted = model(torch.stack(INPUTS)) > 0.5
        np.testing.assert_array_equal(index.columns["prediction"], wanted.long().numpy())


def test_soft_labels_of_one_output_stay_values(tmp_path: Path) -> None:
    rows = [(x, 0.1 + 0.8 * label) for x, label in BINARY]
    index = tiny.build(task_of(rows, one_logit, binary_loss, first), tmp_path / "a", 1)
    assert index.columns["label"].dtype == np.float64
    assert index.columns["prediction"].dtype == np.float64
    without = tiny.build(task_of(rows, one_logit, binary_loss), tmp_path / "b", 1)
    assert np.isnan(without.columns["prediction"]).all()


# Predictions from the loss


@pytest.mark.parametrize("task", [PairTask(tiny.mlp, ROWS), PairTask(tiny.mlp, ROWS, lambda m, b: nll(m(b[0]), b[1]))])
def test_predictions_are_taken_from_the_loss(tmp_path: Path, task: PairTask) -> None:
    index = tiny.build(task, tmp_path, 1)
    model = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "again", 1)[0])
    wanted = model(torch.stack(INPUTS)).argmax(1)
    np.testing.assert_array_equal(index.columns["prediction"], wanted.numpy())
    (result,) = index.influence([(INPUTS[3], None)])
    assert (result.target, result.prediction) == ("loss at the predicted label", int(wanted[3]))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(1), labels, reduction="none")


def test_values_are_predicted_where_they_are_the_labels(tmp_path: Path) -> None:
    """Not where the loss compares the output with something else than the label, its logarithm, say."""
    rows = [(x, float(x.abs().sum())) for x in INPUTS]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(first(model, batch), batch[1].float(), reduction="none")

    def of_logarithm(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(first(model, batch), batch[1].float().log(), reduction="none")

    index = tiny.build(task_of(rows, one_logit, loss), tmp_path / "a", 1)
    model = tiny.loaded(index.task, tiny.checkpoints(index.task, tmp_path / "again", 1)[0])
    np.testing.assert_allclose(index.columns["prediction"], model(torch.stack(INPUTS)).detach(), rtol=1e-4)
    with pytest.raises(QueryError, match="no label"):
        index.influence([(INPUTS[0], None)])
    other = tiny.build(task_of(rows, one_logit, of_logarithm), tmp_path / "b", 1)
    assert np.isnan(other.columns["prediction"]).all()


# What is said of it


def by_hand(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return logits.logsumexp(1) - (logits * F.one_hot(batch[1], logits.shape[1])).sum(1)


def margin(model: nn.Module, batch: Any) -> Tensor:
    return F.relu(1 - model(batch[0])[:, 0])


def cubic(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).abs() ** 3


def penalized(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="none") + logits.exp().sum(1) / 100


@pytest.mark.parametrize(
    ("task", "source", "words"),
    [
        (PairTask(tiny.mlp, ROWS), "loss", "categorical over 3 classes (cross_entropy), exact expectation over the cl"),
        (
            PairTask(lambda: nn.Linear(5, 21), ROWS),
            "loss",
            "categorical over 21 classes (cross_entropy), labels drawn",
        ),
        (task_of(BINARY, one_logit, binary_loss), "loss", "Bernoulli (binary_cross_entropy_with_logits), exact"),
        (ValueTask(tiny.value_mlp, tiny.values(9)), "loss", "Gaussian (squares), exact expectation"),
        (ClassTask(tiny.mlp, ROWS, by_hand), "predict", "categorical over 3 classes (Task.predict), exact expectation"),
        (PairTask(tiny.mlp, ROWS, by_hand), "empirical", "since the task defines no predict"),
    ],
)
def test_the_source_of_the_labels_is_described(task: Task, source: str, words: str, tmp_path: Path) -> None:
    outputs = outputs_of(task, tmp_path)
    assert outputs.source == source
    assert words.removeprefix("since ") in outputs.description


def test_squared_errors_out_of_sight_are_found_by_shifted_labels(tmp_path: Path) -> None:
    """A loss that no function computes: values are drawn only if it is a parabola around the prediction."""

    def product(model: nn.Module, batch: Any) -> Tensor:
        error = model(batch[0])[:, 0] - batch[1]
        return error * error

    def column(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]

    quadratic = outputs_of(task_of(tiny.values(9), tiny.value_mlp, product, column), tmp_path)
    assert quadratic.source == "predict"
    for loss in (cubic, lambda model, batch: F.softplus(-column(model, batch) * (2 * batch[1] - 1))):
        found = outputs_of(task_of(tiny.values(9), tiny.value_mlp, loss, column), tmp_path)
        assert found.source == "empirical"
        assert "not a squared error around the predicted values" in found.description


def test_predictions_whose_labels_fail_are_not_used(tmp_path: Path) -> None:
    """The user's own code on labels that the library made up: it is not the rows' fault."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        error = first(model, batch) - batch[1].float().log()
        return error * error

    rows = [(x, float(x.abs().sum())) for x in INPUTS]
    outputs = outputs_of(task_of(rows, one_logit, loss, lambda model, batch: first(model, batch)), tmp_path)
    assert outputs.source == "empirical"
    triples = [(x, label, 0) for x, label in ROWS]
    outputs = outputs_of(task_of(triples, tiny.mlp, by_hand, first), tmp_path)
    assert outputs.source == "empirical"
    assert "define with_label" in outputs.description


def test_what_the_curvature_is_made_from_is_never_silent(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"empirical Fisher information.*Let the loss call PyTorch's") as warned:
        index = tiny.build(PairTask(tiny.mlp, ROWS, margin), tmp_path / "empirical", basis="spectral")
    assert len(warned) == 1
    fisher = read_manifest(tmp_path / "empirical" / "index").fisher
    assert fisher is not None
    assert fisher.source == "empirical"
    assert any(fisher.sentence in line for line in details(tmp_path / "empirical" / "index"))
    for method in index.methods:
        told = convention(method, fisher=fisher)
        assert (fisher.sentence in told) == (method in ("influence", "source", "fast-source"))
    with pytest.warns(UserWarning, match="a part of the loss: categorical over 3 classes"):
        tiny.build(PairTask(tiny.mlp, ROWS, penalized), tmp_path / "penalized", basis="spectral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny.build(PairTask(tiny.mlp, ROWS, margin), tmp_path / "none").manifest.fisher is None


def test_an_index_of_another_format_is_refused_as_such(tmp_path: Path) -> None:
    """Before its fields are looked at, which may be other ones."""
    tiny.build(PairTask(tiny.mlp, ROWS), tmp_path)
    path = tmp_path / "index" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 2, "unheard of": 1}))
    with pytest.raises(StoreError, match=r"has format 2, an older one, .* reads formats 3 to 5: rebuild"):
        read_manifest(tmp_path / "index")
