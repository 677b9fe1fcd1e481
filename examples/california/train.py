"""Train the California network by Adam, as in the TracIn paper: half a minute, 80 % of the variance explained."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.data.dataset import fetch
from gradtrace.tasks import TabularRegression


def train(task: TabularRegression, out: Path, epochs: int = 30, batch_size: int = 64, seed: int = 0) -> float:
    """Leave 5 checkpoints in `out/checkpoints`; returns the share of the held-out prices' variance explained."""
    torch.manual_seed(seed)
    model = task.model()
    loader = DataLoader(task.train, batch_size, shuffle=True, drop_last=True, collate_fn=task.collate)
    steps = epochs * len(loader)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    recorder = CheckpointRecorder(out / "checkpoints", every=steps // 5, batch_size=batch_size)
    explained = 0.0
    for epoch in range(1, epochs + 1):
        for batch in loader:
            loss = task.loss(model, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model, optimizer)
            scheduler.step()
        explained = evaluate(task, model)
        print(f"epoch {epoch} of {epochs}: {explained:.1%} of the variance explained", flush=True)
    return explained


@torch.no_grad()
def evaluate(task: TabularRegression, model: nn.Module) -> float:
    """1 - squared error / variance, over the held-out rows."""
    batch = task.collate(fetch(task.query, range(len(task.query))))
    prices = batch[1]
    return 1 - float((task.predict(model, batch) - prices).square().mean() / prices.var(correction=0))


if __name__ == "__main__":
    from task import TASK

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/california"))
    train(TASK, parser.parse_args().out)
