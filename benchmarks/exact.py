"""Exact scores, uncompressed and in float32, computed once and kept in a file: what indexes are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gradtrace.basis import identity_basis
from gradtrace.checkpoints import Checkpoint
from gradtrace.dataset import fetch
from gradtrace.encoder import GradientModel
from gradtrace.task import Example, Task

_BATCH = 128


def exact_tracin(
    task: Task, checkpoints: Sequence[Checkpoint], queries: Sequence[Example], cache: Path | None = None
) -> NDArray[np.float32]:
    """TracInCP from whole gradients, sum_i lr_i grad(z') . grad(z). float32 [queries, rows]."""
    if cache is not None and cache.exists():
        found: NDArray[np.float32] = np.load(cache)
        return found
    rows = len(task.train)
    scores = torch.zeros(len(queries), rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for checkpoint in checkpoints:
        model = GradientModel(task, checkpoint, device, [task.train[0], task.train[1]])
        whole = identity_basis(model.plan.layers, seed=0)
        wanted = torch.cat(
            [model.encode(whole, model.batch(queries[i : i + _BATCH]))[0] for i in range(0, len(queries), _BATCH)]
        )
        for start in tqdm(range(0, rows, _BATCH), f"exact {checkpoint.name}", leave=False):
            stop = min(start + _BATCH, rows)
            gradients, _ = model.encode(whole, model.batch(fetch(task.train, range(start, stop))))
            scores[:, start:stop] += (checkpoint.learning_rate * (wanted @ gradients.T)).cpu()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, scores.numpy())
    return scores.numpy()


def agreement(scores: NDArray[np.float32], exact: NDArray[np.float32], k: int = 10) -> tuple[float, float]:
    """Mean over the queries of Pearson's r, and of the share of the exact top k that the scores' top k holds."""
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores, exact, strict=True)]
    overlaps = [
        len(set(np.argpartition(-a, k)[:k]) & set(np.argpartition(-b, k)[:k])) / k
        for a, b in zip(scores, exact, strict=True)
    ]
    return float(np.mean(correlations)), float(np.mean(overlaps))
