"""kronfluence's EK-FAC beside `influence` at the last checkpoint: `python -m benchmarks.peers.ekfac mnist`.

Both fit the curvature on the same rows and damp each layer by a tenth of its mean eigenvalue, kronfluence's rule. The
labels of the Fisher are the data's own (the empirical Fisher); or those that Gradtrace takes, every class by its
probability, given to kronfluence as well; or kronfluence draws one for each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import kronfluence.task
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from benchmarks.peers.comparison import HEADER, Case, Scores, compared, load_case, parse, timed
from benchmarks.peers.gradtrace_scores import ModelLabels, TrueLabels, WeightedBatch, fisher_examples, influence_scores
from gradtrace.checkpoints import load_into
from gradtrace.task import Batch

_BATCH = 128


class KronfluenceTask(kronfluence.task.Task):
    """In float64, as Gradtrace's tasks: float32 turns the gradients of rows that the model is sure of."""

    def __init__(self, task: TrueLabels) -> None:
        self.task = task

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        if isinstance(batch, WeightedBatch):  # so that a row's squared gradient counts by its weight
            measure = batch.measure or self.task.loss
            return (batch.weights.sqrt() * measure(model, batch.batch)).sum()
        if not sample:
            return self.task.loss(model, batch).sum()
        logits = self.task.whole.predict(model, batch).double()
        labels = torch.multinomial(logits.detach().softmax(1), 1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def kronfluence_scores(
    case: Case, task: TrueLabels, fitted: Sequence[WeightedBatch] | None = None, draw: bool = False
) -> Scores:
    """Curvature of the training rows with their labels, or with labels drawn for them; or of the batches `fitted`."""
    model = task.model()
    load_into(model, case.checkpoints[-1])
    peer = KronfluenceTask(task)
    loading = DataLoaderKwargs(collate_fn=case.task.collate)
    whole = DataLoaderKwargs(collate_fn=lambda batches: batches[0])
    rows: dict[str, Any] = {
        "dataset": task.train if fitted is None else fitted,
        "per_device_batch_size": _BATCH if fitted is None else 1,
        "dataloader_kwargs": loading if fitted is None else whole,
    }
    with TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "peers", prepare_model(model, peer), peer, cpu=True, disable_tqdm=True, output_dir=directory
        )
        analyzer.fit_all_factors("ekfac", **rows, factor_args=FactorArguments(use_empirical_fisher=not draw))
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


def main() -> None:
    arguments = parse(__doc__, rows=1024, queries=20)
    print(HEADER)
    for dataset in arguments.datasets:
        case = load_case(dataset, arguments.runs, arguments.rows, arguments.queries)
        true, model_labels = TrueLabels(case.task), ModelLabels(case.task)
        ours = timed(partial(influence_scores, case, true))
        theirs = timed(partial(kronfluence_scores, case, true))
        print(compared(case, "kronfluence", "influence, true labels", theirs, ours), flush=True)
        ours = timed(partial(influence_scores, case, model_labels))
        theirs = timed(partial(kronfluence_scores, case, model_labels, fisher_examples(case, model_labels)))
        print(compared(case, "kronfluence", "influence, every class by its probability", theirs, ours), flush=True)
        theirs = timed(partial(kronfluence_scores, case, model_labels, draw=True))
        print(compared(case, "kronfluence", "influence, one label drawn by the peer", theirs, ours), flush=True)


if __name__ == "__main__":
    main()
