"""kronfluence's EK-FAC beside `influence` at the last checkpoint: `python -m benchmarks.peers.ekfac mnist`.

Both fit the curvature on the same rows and damp each layer by a tenth of its mean eigenvalue, kronfluence's rule. The
labels of the Fisher are the data's own (the empirical Fisher); or drawn from the model's predictions, those that
Gradtrace drew for both; or each library draws its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory

import kronfluence.task
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from benchmarks.peers.comparison import HEADER, Case, Scores, compared, load_case, parse, timed
from gradtrace.checkpoints import load_into
from gradtrace.dataset import fetch
from gradtrace.encoder import GradientModel
from gradtrace.fisher import fisher_batches
from gradtrace.task import Batch, Example, Task
from gradtrace_indexer import build_index
from gradtrace_indexer.fit import Samples

_DAMPING = 0.1  # of a layer's mean eigenvalue
_BATCH = 128
_SEED = 0


class TrueLabels(Task):
    """A task without the parameters that kronfluence leaves out (it knows Linear and Conv2d only), and without
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
        return self.whole.loss(model, batch)


class DrawnLabels(TrueLabels):
    """With predictions, to draw labels from."""

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.whole.predict(model, batch)


class KronfluenceTask(kronfluence.task.Task):
    def __init__(self, task: TrueLabels) -> None:
        self.task = task

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        logits = self.task.whole.predict(model, batch).double()  # as in Gradtrace's loss: float32 turns gradients
        labels = torch.multinomial(logits.detach().softmax(1), 1).flatten() if sample else batch[1]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def drawn_rows(case: Case, task: DrawnLabels) -> list[Example]:
    """The rows with the labels that `build_index` draws for the Fisher."""
    model = GradientModel(task, case.checkpoints[-1], torch.device("cpu"), fetch(task.train, [0, 1]))
    batches = fisher_batches(model, Samples(task, _SEED, case.rows), _SEED)
    return [pair for images, labels in batches for pair in zip(images, labels, strict=True)]


def kronfluence_scores(case: Case, task: TrueLabels, fitted: Sequence[Example], draw: bool = False) -> Scores:
    """Curvature of the rows `fitted` with their labels, or with labels drawn for them."""
    model = task.model()
    load_into(model, case.checkpoints[-1])
    peer = KronfluenceTask(task)
    loading = DataLoaderKwargs(collate_fn=case.task.collate)
    fisher = FactorArguments(use_empirical_fisher=not draw)
    with TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "peers", prepare_model(model, peer), peer, cpu=True, disable_tqdm=True, output_dir=directory
        )
        analyzer.fit_all_factors("ekfac", fitted, _BATCH, dataloader_kwargs=loading, factor_args=fisher)
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            case.queries,
            task.train,
            len(case.queries),
            _BATCH,
            dataloader_kwargs=loading,
            score_args=ScoreArguments(damping_factor=None),  # the rule: a tenth of the layer's mean eigenvalue
        )
        scores: Scores = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
    return scores


def gradtrace_scores(case: Case, task: TrueLabels) -> Scores:
    """With a coordinate for every parameter, and without the weight decay that `influence` adds to the curvature."""
    checkpoint = dataclasses.replace(case.checkpoints[-1], optimizer=None)
    with TemporaryDirectory() as directory:
        index = build_index(
            task,
            [checkpoint],
            f"{directory}/index",
            dimensions=sum(parameter.numel() for parameter in task.model().parameters()),
            precision="float16",
            seed=_SEED,
            progress=False,
        )
        return index.scores(case.queries, method="influence", damping=_DAMPING)


def main() -> None:
    arguments = parse(__doc__, rows=2048, queries=20)
    print(HEADER)
    for dataset in arguments.datasets:
        case = load_case(dataset, arguments.runs, arguments.rows, arguments.queries)
        true, drawn = TrueLabels(case.task), DrawnLabels(case.task)
        ours = timed(partial(gradtrace_scores, case, true))
        theirs = timed(partial(kronfluence_scores, case, true, true.train))
        print(compared(case, "kronfluence", "influence, true labels", theirs, ours), flush=True)
        ours = timed(partial(gradtrace_scores, case, drawn))
        theirs = timed(partial(kronfluence_scores, case, drawn, drawn_rows(case, drawn)))
        print(compared(case, "kronfluence", "influence, the same drawn labels", theirs, ours), flush=True)
        theirs = timed(partial(kronfluence_scores, case, drawn, drawn.train, draw=True))
        print(compared(case, "kronfluence", "influence, labels drawn by each", theirs, ours), flush=True)


if __name__ == "__main__":
    main()
