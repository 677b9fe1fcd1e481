"""Exact scores, uncompressed and in float32, computed once and kept in a file: what indexes are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gradtrace.checkpoints import Checkpoint
from gradtrace.dataset import fetch
from gradtrace.encoder import GradientModel
from gradtrace.layers import Layer
from gradtrace.task import Example, Task

_BATCH = 128

Factors = tuple[
    Tensor, ...
]  # (a [batch, in], d [batch, out]) where there is one position, else (gradient [batch, size],)


def exact_tracin(
    task: Task, checkpoints: Sequence[Checkpoint], queries: Sequence[Example], cache: Path | None = None
) -> NDArray[np.float32]:
    """TracInCP from whole gradients, sum_i lr_i grad(z') . grad(z). float32 [queries, rows]."""
    if cache is not None and cache.exists():
        found: NDArray[np.float32] = np.load(cache)
        return found
    rows = len(task.train)
    scores = torch.zeros(len(queries), rows)
    for checkpoint in checkpoints:
        model = GradientModel(task, checkpoint, torch.device("cpu"), [task.train[0], task.train[1]])
        wanted = _joined([_factors(model, queries[i : i + _BATCH]) for i in range(0, len(queries), _BATCH)])
        for start in tqdm(range(0, rows, _BATCH), f"exact {checkpoint.name}", leave=False):
            examples = fetch(task.train, range(start, min(start + _BATCH, rows)))
            products = _products(wanted, _factors(model, examples))
            scores[:, start : start + len(examples)] += checkpoint.learning_rate * products
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, scores.numpy())
    return scores.numpy()


def _factors(model: GradientModel, examples: Sequence[Example]) -> dict[str, Factors]:
    """What the inner products of the layers' gradients need, by layer (none of them used twice)."""
    found: dict[str, Factors] = {}

    def add(layer: Layer, x: Tensor, d: Tensor) -> None:
        assert layer.name not in found
        if layer.rotates and layer.rotates_inputs and x.dim() == 2:
            found[layer.name] = (layer.input_factors(x, None).flatten(1), layer.output_factors(d, None).flatten(1))
        else:
            found[layer.name] = (layer.gradient(x, d).flatten(1),)

    assert not model.plan.strays
    model.backpropagate(model.batch(examples), add)
    return found


def _joined(parts: Sequence[dict[str, Factors]]) -> dict[str, Factors]:
    return {name: tuple(torch.cat(side) for side in zip(*(p[name] for p in parts), strict=True)) for name in parts[0]}


def _products(queries: dict[str, Factors], rows: dict[str, Factors]) -> Tensor:
    """[queries, batch]: (d a^T) . (d' a'^T) = (a . a') (d . d')."""
    by_layer: Iterator[Tensor] = (
        torch.stack([q @ r.T for q, r in zip(queries[name], rows[name], strict=True)]).prod(0) for name in rows
    )
    return torch.stack(list(by_layer)).sum(0)


def agreement(scores: NDArray[np.float32], exact: NDArray[np.float32], k: int = 10) -> tuple[float, float]:
    """Mean over the queries of Pearson's r, and of the share of the exact top k that the scores' top k holds."""
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores, exact, strict=True)]
    overlaps = [
        len(set(np.argpartition(-a, k)[:k]) & set(np.argpartition(-b, k)[:k])) / k
        for a, b in zip(scores, exact, strict=True)
    ]
    return float(np.mean(correlations)), float(np.mean(overlaps))
