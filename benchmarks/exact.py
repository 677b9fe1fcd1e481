"""Exact scores, uncompressed and in float32, computed once and kept in a file: what indexes are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gradtrace.checkpoints import Checkpoint
from gradtrace.data.dataset import fetch
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Example, Task

_BATCH = 128


def exact_tracin(
    task: Task, checkpoints: Sequence[Checkpoint], queries: Sequence[Example], cache: Path | None = None
) -> NDArray[np.float32]:
    """TracInCP from full gradients, sum_i lr_i grad(z') . grad(z). float32 [queries, rows]."""
    if cache is not None and cache.exists():
        found: NDArray[np.float32] = np.load(cache)
        return found
    rows = len(task.train)
    scores = torch.zeros(len(queries), rows)
    for checkpoint in checkpoints:
        model = GradientModel(task, checkpoint, torch.device("cpu"), [task.train[0], task.train[1]])
        asked = full_gradients(model, model.batch(queries))
        for start in tqdm(range(0, rows, _BATCH), f"exact {checkpoint.name}", leave=False):
            examples = fetch(task.train, range(start, min(start + _BATCH, rows)))
            products = asked.inner_products(full_gradients(model, model.batch(examples)))
            scores[:, start : start + len(examples)] += checkpoint.learning_rate * sum(products.values())
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
