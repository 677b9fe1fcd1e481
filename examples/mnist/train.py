"""Train the MNIST network by plain SGD, as in the TracIn paper: under a minute on 2 cores, 98 % right."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.tasks import ImageClassification


def train(task: ImageClassification, out: Path, epochs: int = 10, batch_size: int = 64, seed: int = 0) -> float:
    """Leave 5 checkpoints in `out/checkpoints`; returns the share of the test images that the model gets right."""
    torch.manual_seed(seed)
    model = task.model()
    loader = DataLoader(task.train, batch_size, shuffle=True, drop_last=True, collate_fn=task.collate)
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    recorder = CheckpointRecorder(out / "checkpoints", every=steps // 5, batch_size=batch_size)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model, optimizer)
            scheduler.step()
        accuracy = evaluate(task, model)
        print(f"epoch {epoch} of {epochs}: {accuracy:.2%} of the test images right", flush=True)
    return accuracy


@torch.no_grad()
def evaluate(task: ImageClassification, model: nn.Module) -> float:
    images, labels = task.collate(task.query.__getitems__(range(len(task.query))))
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    from task import TASK

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    train(TASK, parser.parse_args().out)
