"""Labels and predictions of many forms: the task's `predict` is there, and must not be needed to be of one form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Loss, Make, ZooTask, refused, right, right_or_refused
from zoo.data import each, generator, labelled, mlp
from zoo.vision import IMAGES, UNet, masks

ROWS = labelled(6)
WORDS = ["cat", "dog", "owl"]


class Predicting(ZooTask):
    """With predictions: what the model returns."""

    def __init__(self, make: Make, train: Any, loss: Loss, key: int | str = 0) -> None:
        super().__init__(make, train, loss)
        self.key = key

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[self.key])  # type: ignore[no-any-return]


def of_words(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), torch.tensor([WORDS.index(word) for word in b[1]]), reduction="none")


def bce(m: nn.Module, b: Any) -> Tensor:
    return F.binary_cross_entropy(m(b[0]), b[1].float(), reduction="none")


def one_output(*end: nn.Module) -> Make:
    return lambda: nn.Sequential(nn.Linear(6, 1), *end, nn.Flatten(0))


LABELS: dict[str, Callable[[], ZooTask]] = {
    "sigmoid_and_binary_cross_entropy": lambda: Predicting(
        one_output(nn.Sigmoid()), [(x, float(x[0] > 0)) for x, _ in ROWS], bce
    ),
    "logarithm_of_a_positive_target": lambda: Predicting(
        one_output(), [(x, float(x.abs().sum())) for x, _ in ROWS], lambda m, b: (m(b[0]) - b[1].float().log()) ** 2
    ),
    "one_hot_labels": lambda: Predicting(
        mlp,
        [(x, F.one_hot(torch.tensor(y), 3).float()) for x, y in ROWS],
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
    ),
    "many_labels_of_an_example": lambda: Predicting(
        mlp,
        [(x, (torch.rand(3, generator=generator(row)) < 0.5).float()) for row, (x, _) in enumerate(ROWS)],
        lambda m, b: each(F.binary_cross_entropy_with_logits(m(b[0]), b[1], reduction="none")),
    ),
    "words_as_labels": lambda: Predicting(mlp, [(x, WORDS[y]) for x, y in ROWS], of_words),
    "dictionaries": lambda: Predicting(
        mlp, [{"x": x, "y": y} for x, y in ROWS], lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"), "x"
    ),
    "triples": lambda: Predicting(
        mlp, [(x, y, "note") for x, y in ROWS], lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    ),
}

for name, make in LABELS.items():
    right(f"labels_are_{name}", rotates=True)(partial(lambda make: make(), make))

# Of several outputs of an example no one label is predicted.
OUTPUTS: dict[str, Callable[[], ZooTask]] = {
    "a_class_for_each_pixel": lambda: Predicting(
        UNet, masks(), lambda m, b: each(F.cross_entropy(m(b[0]), b[1], reduction="none"))
    ),
    "an_image_as_prediction": lambda: Predicting(
        lambda: nn.Conv2d(3, 3, 3, padding=1), IMAGES, lambda m, b: each((m(b[0]) - b[0].tanh()).square())
    ),
}

for name, make in OUTPUTS.items():
    right_or_refused("predict", "leave predict out|define", name=f"labels_are_{name}")(
        partial(lambda make: make(), make)
    )


class Measuring(ZooTask):
    """Queries are measured by something else than the loss."""

    def __init__(self, measure: Loss) -> None:
        super().__init__(mlp, ROWS)
        self.measure = measure

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return self.measure(model, batch)


def margin(m: nn.Module, b: Any) -> Tensor:
    """The negative margin of the true class over the best other one."""
    logits = m(b[0])
    other = logits.scatter(1, b[1][:, None], -torch.inf).amax(1)
    return other - logits.gather(1, b[1][:, None])[:, 0]


@right()
def measurement_of_the_margin() -> ZooTask:
    return Measuring(margin)


@refused(r"measurement", r"shape|reduc|each example|per example|own")
def measurement_that_is_a_mean() -> ZooTask:
    return Measuring(lambda m, b: margin(m, b).mean())


@refused(r"measurement", r"own|alone|each example|mixes")
def measurement_by_the_batch() -> ZooTask:
    return Measuring(lambda m, b: margin(m, b) - (margin(m, b).mean() if len(b[0]) > 2 else 0))
