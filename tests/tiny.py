"""Small tasks, models, data and checkpoints whose index is built in a fraction of a second.

Data and weights are random. `made_index` writes an index of given rows; `digits_task` is the one real training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gradtrace import Checkpoint, Index, Task
from gradtrace_indexer import build_index as build_index

Loss = Callable[[nn.Module, Any], Tensor]


class PairTask(Task):
    """Classification of (input, label) pairs by a model's logits; parts can be replaced."""

    def __init__(self, make: Callable[[], nn.Module], train: Any, loss: Loss | None = None) -> None:
        self.make, self.train = make, train
        if loss is not None:
            self.loss = loss  # type: ignore[method-assign]

    def model(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(1), batch[1], reduction="none")


class ClassTask(PairTask):
    """The same, with predictions."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten(1)


class ValueTask(PairTask):
    """Regression: c times the squared error of the model's single output."""

    c = 1.0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.c * (self.predict(model, batch) - batch[1]).square()

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def value_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


class _OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight, (grads[0] * x).sum(0)


class OwnScale(nn.Module):
    """A weight for each feature, by an autograd function without a rule for vmap."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return _OwnProduct.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


def classes(rows: int, shape: tuple[int, ...] = (5,), seed: int = 0, labels: int = 3) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, *shape, generator=generator)
    return list(zip(inputs, torch.randint(labels, (rows,), generator=generator).tolist(), strict=True))


def values(rows: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(rows, 5, generator=generator), torch.randn(rows, generator=generator), strict=True))


def checkpoints(task: Task, directory: Path, count: int = 2, scale: float = 1.0, seed: int = 0) -> list[Checkpoint]:
    """Weights drawn anew for each; steps 10, 30, 60, ...; learning rates 0.1, 0.05, 0.033, ...,
    constant since the checkpoint before, so that each stretch has a sum of 1."""
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(1, count + 1):
        torch.manual_seed(number + 1000 * seed)
        state = {
            name: torch.randn_like(value) * scale * 0.5 if value.is_floating_point() else value
            for name, value in task.model().state_dict().items()
        }
        state = {name: value.abs() if name.endswith("running_var") else value for name, value in state.items()}
        path = directory / f"{number}.pt"
        torch.save(state, path)
        found.append(Checkpoint(path, 5 * number * (number + 1), 0.1 / number, learning_rate_sum=float(number)))
    return found


def loaded(task: Task, checkpoint: Checkpoint) -> nn.Module:
    model = task.model()
    model.load_state_dict(checkpoint.load())
    return model.eval()


def build(task: Task, directory: Path, count: int = 2, **arguments: Any) -> Index:
    """Build `directory/index` at checkpoints in `directory/checkpoints`."""
    found = checkpoints(task, directory / "checkpoints", count)
    return build_index(
        task, found, directory / "index", progress=False, **{"basis": "none", "precision": "float16", **arguments}
    )


def ends(scores: NDArray[np.float32], k: int) -> tuple[list[int], list[int]]:
    """The rows with the k highest positive and the k lowest negative scores [rows], the lower of equals first."""
    best, worst = (np.argsort(sign * scores, kind="stable")[:k].tolist() for sign in (-1, 1))
    return [row for row in best if scores[row] > 0], [row for row in worst if scores[row] < 0]


def flat(gradients: dict[str, Tensor], order: Sequence[str] | None = None) -> Tensor:
    """Gradients by name [batch, ...] side by side. [batch, parameters]."""
    return torch.cat([gradients[name].flatten(1) for name in order or gradients], dim=1)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def stored(index: Index) -> Tensor:
    """All rows as they are on disk, dequantised. [rows, checkpoints, dimensions]."""
    store = index.contents.store
    return torch.cat([block for _, block in store.blocks(range(store.checkpoints), 1000)])
