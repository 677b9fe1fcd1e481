"""Train the small MNIST network on all its rows several times, six checkpoints each: seconds for a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from task import BATCH_SIZE, EPOCHS, TASK, TO_ZERO, MNIST6k
from torch import nn

from gradtrace.checkpoints.recorder import CheckpointRecorder


def train(task: MNIST6k, out: Path, seed: int) -> float:
    """Leave 6 checkpoints in `out/checkpoints`; returns the share of the test images that the model gets right."""
    rows = range(len(task.train))
    steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
    recorder = CheckpointRecorder(out / "checkpoints", every=steps // 6, batch_size=BATCH_SIZE)
    return evaluate(task, task.fit(rows, seed, recorder.step))


@torch.no_grad()
def evaluate(task: MNIST6k, model: nn.Module) -> float:
    images, labels = task.collate(task.query.__getitems__(range(len(task.query))))
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist6k"))
    parser.add_argument("--to-zero", action="store_true", help="with a learning rate that falls linearly to zero")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    for seed in range(arguments.runs):
        accuracy = train(TO_ZERO if arguments.to_zero else TASK, arguments.out / f"run-{seed}", seed)
        print(f"run {seed}: {accuracy:.2%} of the test images right", flush=True)
