"""Train the small MNIST network on all its rows several times, six checkpoints each: seconds for a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from gradtrace.recorder import CheckpointRecorder
from gradtrace.task import Task


def train(task: Task, out: Path, seed: int) -> float:
    """Leave 6 checkpoints in `out/checkpoints`; returns the share of the test images that the model gets right."""
    from task import BATCH_SIZE, EPOCHS

    rows = range(len(task.train))
    steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
    recorder = CheckpointRecorder(out / "checkpoints", every=steps // 6, batch_size=BATCH_SIZE)
    return evaluate(task, task.fit(rows, seed, recorder.step))


@torch.no_grad()
def evaluate(task: Task, model: nn.Module) -> float:
    images, labels = task.collate([task.query[row] for row in range(len(task.query))])
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    from task import TASK

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist6k"))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    for seed in range(arguments.runs):
        accuracy = train(TASK, arguments.out / f"run-{seed}", seed)
        print(f"run {seed}: {accuracy:.2%} of the test images right", flush=True)
