"""Gradtrace's side of every comparison. Nothing here needs another library."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers.comparison import Case, Scores
from gradtrace.data.batches import Measure
from gradtrace.data.dataset import fetch
from gradtrace.fitted.fisher_batches import fisher_batches
from gradtrace.models.gradient_model import GradientModel
from gradtrace.opening import open_index
from gradtrace.task import Batch, Task
from gradtrace_indexer import add_kernels, build_index
from gradtrace_indexer.build.fit import Samples

INFLUENCE_DAMPING = 0.1  # of a layer's mean eigenvalue
TRAK_DAMPING = 0.01  # of the kernel's mean diagonal
TRAK_DIMENSIONS = 512
_SEED = 0


class TrueLabels(Task):
    """A classifier without the parameters that kronfluence leaves out (it knows Linear and Conv2d only), and without
    predictions: the Fisher's labels are then the data's own."""

    def __init__(self, task: Task) -> None:
        self.train, self.query, self.whole = task.train, task.query, task

    def model(self) -> nn.Module:
        model = self.whole.model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """-log p, written out: labels of the model's own would be taken from a loss function that is recognised."""
        logits = self.whole.predict(model, batch).double()
        return (logits.logsumexp(1) - logits.gather(1, batch[1][:, None])[:, 0]).float()


class ModelLabels(TrueLabels):
    """With predictions: the Fisher's labels are then every class by its probability, as for few classes here."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.whole.loss(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.whole.predict(model, batch)


class WeightedBatch(NamedTuple):
    """Rows, each counting by its weight [batch]; and what is differentiated, None: the task's loss."""

    batch: Batch
    weights: Tensor
    measure: Measure | None


def fisher_examples(case: Case, task: TrueLabels) -> list[WeightedBatch]:
    """The rows as `build_index` labels and weights them for the curvature of the last checkpoint."""
    model = GradientModel(task, case.checkpoints[-1], torch.device("cpu"), fetch(task.train, [0, 1]))
    labelled = fisher_batches(model, Samples(task, _SEED, case.rows), _SEED)
    return [WeightedBatch(one.batch.collated, one.weights, one.measure) for one in labelled]


def tracin_scores(case: Case, **arguments: Any) -> Scores:
    """`arguments` are those of `build_index`."""
    with TemporaryDirectory() as directory:
        index = build_index(case.task, case.checkpoints, f"{directory}/index", progress=False, **arguments)
        return index.scores(case.queries, method="tracin")


def influence_scores(case: Case, task: TrueLabels) -> Scores:
    """At the last checkpoint, with a coordinate for every parameter."""
    with TemporaryDirectory() as directory:
        index = build_index(
            task,
            [case.checkpoints[-1]],
            f"{directory}/index",
            dimensions=sum(parameter.numel() for parameter in task.model().parameters()),
            basis="spectral",
            precision="float16",
            seed=_SEED,
            progress=False,
        )
        return index.scores(case.queries, method="influence", damping=INFLUENCE_DAMPING)


def trak_scores(case: Case, directory: Path) -> Scores:
    """The index stays in `directory`, for its basis."""
    build_index(case.task, case.checkpoints, directory, dimensions=TRAK_DIMENSIONS, precision="float16", progress=False)
    add_kernels(directory, damping=TRAK_DAMPING, progress=False)
    return open_index(directory, case.task).scores(case.queries, method="trak")
