"""Train the MNIST network by plain SGD, as in the TracIn paper: about a minute on 2 cores, 98 % right."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from gradtrace.recorder import CheckpointRecorder
from gradtrace.tasks import ImageClassification


def train(task: ImageClassification, out: Path, epochs: int = 10, batch_size: int = 64, seed: int = 0) -> float:
    """Leave 5 checkpoints in `out/checkpoints`; the share of the test images that the model gets right."""
    torch.manual_seed(seed)
    model = task.model()
    steps = len(task.train) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=epochs * steps)
    recorder = CheckpointRecorder(out / "checkpoints", every=epochs * steps // 5, batch_size=batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(task.train)).tolist()
        for start in range(0, steps * batch_size, batch_size):
            images, labels = task.collate(task.train.__getitems__(order[start : start + batch_size]))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model, optimizer)
            scheduler.step()
        accuracy = evaluate(task, model)
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, {accuracy:.2%} of the test images right")
    return accuracy


@torch.no_grad()
def evaluate(task: ImageClassification, model: torch.nn.Module) -> float:
    images, labels = task.collate(task.query.__getitems__(range(len(task.query))))
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    from task import TASK

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    train(TASK, parser.parse_args().out)
