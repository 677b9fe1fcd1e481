"""Train the CIFAR-10 ResNet-9: ten minutes of one core's time, 85 % right."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.tasks import ImageClassification

RATE = 0.15
WARM_UP = 0.2  # the share of all steps in which the rate rises


def train(task: ImageClassification, out: Path, epochs: int = 10, batch_size: int = 128, seed: int = 0) -> float:
    """Leave 5 checkpoints in `out/checkpoints`; returns the share of the test images that the model gets right."""
    torch.manual_seed(seed)
    model = task.model().train()
    loader = DataLoader(task.train, batch_size, shuffle=True, drop_last=True, collate_fn=task.collate)
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
    recorder = CheckpointRecorder(out / "checkpoints", every=steps // 5, batch_size=batch_size)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            loss = F.cross_entropy(model(augment(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model, optimizer)
            scheduler.step()
        accuracy = evaluate(task, model)
        print(f"epoch {epoch} of {epochs}: {accuracy:.2%} of the test images right", flush=True)
    return accuracy


def schedule(done: float) -> float:
    """Up to 1 while warming up, then down to 0.05, both in a straight line."""
    return 0.2 + 0.8 * done / WARM_UP if done < WARM_UP else 1 - 0.95 * (done - WARM_UP) / (1 - WARM_UP)


def augment(images: Tensor, shift: int = 2) -> Tensor:
    """Each image [channels, height, width] of the batch mirrored or not and moved by up to `shift` pixels."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    rows = torch.randint(2 * shift + 1, (batch, 1)) + torch.arange(height)  # [batch, height]
    columns = torch.randint(2 * shift + 1, (batch, 1)) + torch.arange(width)  # [batch, width]
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, columns.flip(1))
    picked = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1)  # [batch, height, width, channels] -> [batch, channels, height, width]


@torch.no_grad()
def evaluate(task: ImageClassification, model: nn.Module) -> float:
    model.eval()
    batches = DataLoader(task.query, 1_000, collate_fn=task.collate)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    model.train()
    return right / len(task.query)


if __name__ == "__main__":
    from task import TASK

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    train(TASK, parser.parse_args().out)
