"""Which checkpoints help most on MNIST: `python -m benchmarks.checkpoint_selection --plot selection.png`.

Trains the MNIST network on some rows with a tenth of their labels wrong, keeps 30 checkpoints, and compares sets of
them by two measures of the TracIn paper: the share of wrong labels among the rows of highest self-influence, and how
far scores on test digits agree with TracInCP over all 30. Gradients are exact, uncompressed. Mean of several seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.checkpoints.selection import choose, least_falls
from gradtrace.data.dataset import fetch
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Example
from gradtrace.tasks import ImageClassification, data_file
from gradtrace_indexer.evaluation.select import mean_losses
from gradtrace_indexer.task_loading import load_task

_CHECKPOINTS, _BATCH, _QUERIES = 30, 250, 100


@dataclass
class Run:
    """One training: what every checkpoint alone has to say, weighted by its learning rate."""

    steps: list[int]
    losses: list[float]  # [checkpoints]
    wrong: NDArray[np.bool_]  # [rows]
    selfs: NDArray[np.float64]  # [checkpoints, rows]
    scores: NDArray[np.float32]  # [checkpoints, queries, rows]

    def found(self, chosen: Sequence[int], share: float) -> float:
        """Share of the wrong labels among this share of the rows, those of highest self-influence."""
        order = np.argsort(-self.selfs[list(chosen)].sum(0))
        return float(self.wrong[order[: round(share * len(order))]].sum() / self.wrong.sum())

    def correlation(self, chosen: Sequence[int]) -> float:
        """Mean over the queries of Pearson's r with the scores of all checkpoints together."""
        some, whole = self.scores[list(chosen)].sum(0), self.scores.sum(0)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(some, whole, strict=True)]))


def noisy_task(rows: int, seed: int) -> tuple[ImageClassification, NDArray[np.bool_]]:
    """MNIST's first rows, a tenth of the labels moved to another class; and which ones."""
    mnist = load_task("examples/mnist/task.py:TASK")
    with np.load(data_file("mnist-train.npz")) as arrays:
        images, labels = arrays["images"][:rows], arrays["labels"][:rows]
    generator = np.random.default_rng(seed)
    wrong = np.zeros(rows, dtype=bool)
    wrong[generator.choice(rows, rows // 10, replace=False)] = True
    labels = np.where(wrong, (labels + generator.integers(1, 10, rows)) % 10, labels)
    return ImageClassification(mnist.model, (images, labels), mnist.query, mean=0.1307, std=0.3081), wrong


def train(task: ImageClassification, directory: Path, epochs: int, seed: int, batch_size: int = 64) -> list[Checkpoint]:
    torch.manual_seed(seed)
    model = task.model()
    loader = DataLoader(task.train, batch_size, shuffle=True, drop_last=True, collate_fn=task.collate)
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    recorder = CheckpointRecorder(directory, every=steps // _CHECKPOINTS, batch_size=batch_size)
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model, optimizer)
            scheduler.step()
    return load_checkpoints(directory)[:_CHECKPOINTS]


def measured(rows: int, epochs: int, seed: int) -> Run:
    task, wrong = noisy_task(rows, seed)
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = train(task, Path(directory), epochs, seed)
        losses = mean_losses(task, checkpoints, seed=seed)
        queries = fetch(task.query, np.random.default_rng(seed).choice(len(task.query), _QUERIES, False).tolist())
        parts = [products(task, checkpoint, queries) for checkpoint in checkpoints]
    selfs, scores = (np.stack(part) for part in zip(*parts, strict=True))
    return Run([one.step for one in checkpoints], losses, wrong, selfs, scores)


def products(
    task: ImageClassification, checkpoint: Checkpoint, queries: Sequence[Example]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Learning rate x the rows' squared gradient norms [rows], and x their products with queries [queries, rows]."""
    model = GradientModel(task, checkpoint, torch.device("cpu"), [task.train[0], task.train[1]])
    wanted = full_gradients(model, model.batch(queries))
    selfs, scores = [], []
    for start in range(0, len(task.train), _BATCH):
        examples = fetch(task.train, range(start, min(start + _BATCH, len(task.train))))
        found = full_gradients(model, model.batch(examples))
        selfs.append(found.squared_norms().float())
        scores.append(sum(wanted.inner_products(found).values(), torch.zeros(len(queries), len(examples))))
    rate = checkpoint.learning_rate
    return (rate * torch.cat(selfs)).numpy(), (rate * torch.cat(scores, dim=1)).numpy()


def sets(run: Run, count: int) -> dict[str, list[int]]:
    """Ways to keep `count` of the checkpoints, the first ones being the earliest."""
    last = len(run.losses)
    even = [round((number + 1) * last / count) - 1 for number in range(count)]
    fastest = sorted(range(last), key=lambda position: -least_falls(run.losses)[position])[:count]
    return {
        "all": list(range(last)),
        "selected (`gradtrace select`)": choose(run.losses, count),
        "evenly spaced": even,
        "the fastest falls": sorted(fastest),
        "first": list(range(count)),
        "last": list(range(last - count, last)),
        "the last alone": [last - 1],
    }


def table(runs: Sequence[Run], count: int) -> str:
    lines = [
        "| checkpoints | steps, seed 0 | wrong in top 10 % | in top 20 % | r with all |",
        "|---|---|--:|--:|--:|",
    ]
    for name, first in sets(runs[0], count).items():
        chosen = [sets(run, count)[name] for run in runs]
        figures = np.array(
            [[run.found(c, 0.1), run.found(c, 0.2), run.correlation(c)] for run, c in zip(runs, chosen, strict=True)]
        )
        steps = f"{len(first)} of them" if name == "all" else ", ".join(str(runs[0].steps[i]) for i in first)
        spread = [f"{mean:.3f} ± {by:.3f}" for mean, by in zip(figures.mean(0), figures.std(0), strict=True)]
        lines.append(f"| {name} | {steps} | {' | '.join(spread)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="Where to draw what each checkpoint alone finds (first seed).")
    arguments = parser.parse_args()
    runs = [measured(arguments.rows, arguments.epochs, seed) for seed in range(arguments.seeds)]
    print(table(runs, arguments.count))
    if arguments.plot is not None:
        draw(runs[0], arguments.count, arguments.plot)


def draw(run: Run, count: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    chosen = choose(run.losses, count)
    above.plot(run.steps, run.losses, ".-", color="grey", label="mean training loss")
    above.plot([run.steps[i] for i in chosen], [run.losses[i] for i in chosen], "o", color="tab:red", label="selected")
    above.set(ylabel="loss", ylim=(0, None))
    above.legend()
    alone = range(len(run.steps))
    below.plot(run.steps, [run.found([i], 0.1) for i in alone], ".-", label="wrong labels found in its top 10 %")
    below.plot(run.steps, [run.correlation([i]) for i in alone], ".-", label="r of its scores with those of all")
    below.set(xlabel="optimizer step of the checkpoint, taken alone", ylim=(0, 1))
    below.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
