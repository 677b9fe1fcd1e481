"""What a case of the zoo is, and how one is judged: against autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace import Checkpoint, Index, Task
from gradtrace_indexer import build_index

Make = Callable[[], nn.Module]
Loss = Callable[[nn.Module, Any], Tensor]

# Names the rows that show that examples depend on one another.
DEPENDS = r"row\S* .*\d.*(depend|differ)|(depend|differ).*row\S* .*\d"

BATCH = 16  # examples, of builds and of queries
_NOISE = 0.1  # added to every weight: what is initialised to zero or one would hide wrong gradients


class ZooTask(Task):
    """A model, rows, a loss and a collate function.

    train: list of rows, or whatever else a user may pass for it.
    loss: default: cross-entropy of `model(batch[0])` with `batch[-1]`.
    trained: makes the model whose weights become the checkpoint's, where that differs from `make`.
    state: what a training would save of that model, where that differs from its state dict.
    """

    def __init__(
        self,
        make: Make,
        train: Any,
        loss: Loss | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        trained: Make | None = None,
        state: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    ) -> None:
        self.make, self.train = make, train
        self.trained = trained or make
        self.state = state or (lambda model: model.state_dict())
        if loss is not None:
            self.loss = loss  # type: ignore[method-assign]
        if collate is not None:
            self.collate = collate  # type: ignore[method-assign]

    def model(self) -> nn.Module:
        return seeded(self.make)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[-1], reduction="none")


def seeded(make: Make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@dataclass(frozen=True)
class Refusal:
    """Patterns that the text of an error must contain, whatever their case."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class Case:
    """A task with queries, and what must come of it.

    refusal: None: the scores must be right.
    or_right: may be refused, or be right.
    lowest_r: Pearson correlation over the rows, of every query.
    largest_error: of a score, relative to the product of the norms of both gradients. Rows are stored in float16.
    rotates: right in the spectral basis as well, if no dimension is dropped.
    needs: an optional library.
    shown: rows 0 and 1 alone would give a mixing task away.
    long: takes seconds, and is close to other cases: `make test` leaves it to `make test-long`.
    """

    name: str
    kind: str
    make: Callable[[], ZooTask]
    refusal: Refusal | None = None
    or_right: bool = False
    lowest_r: float = 0.9999
    largest_error: float = 1e-3
    rotates: bool = False
    needs: str | None = None
    shown: bool = False
    long: bool = False

    def queries(self, task: ZooTask) -> list[Any]:
        """Some rows, not the first two."""
        return [task.train[row] for row in (2, 3, 5, 8, 13, 21)] if isinstance(task.train, list) and task.train else []


CASES: dict[str, Case] = {}

Register = Callable[[Callable[[], ZooTask]], Callable[[], ZooTask]]


def right(name: str | None = None, **options: Any) -> Register:
    """Register a task whose scores must be right."""

    def add(make: Callable[[], ZooTask]) -> Callable[[], ZooTask]:
        made_by: Any = getattr(make, "func", make)  # of a functools.partial
        key = name or made_by.__name__
        assert key not in CASES, f"two cases are named {key}"
        CASES[key] = Case(key, made_by.__module__.rpartition(".")[2], make, **options)
        return make

    return add


def refused(cause: str, remedy: str, name: str | None = None, **options: Any) -> Register:
    """Register a task that must be refused with a text that names cause and remedy (regular expressions)."""
    return right(name, refusal=Refusal(cause, remedy), **options)


def right_or_refused(cause: str, remedy: str, **options: Any) -> Register:
    """Register a task whose scores must be right, if it is not refused."""
    return refused(cause, remedy, or_right=True, **options)


class Agreement(NamedTuple):
    lowest_r: float
    largest_error: float


def trained_model(task: ZooTask) -> nn.Module:
    """The checkpoint's model: weights at random, none zero or one, statistics of norms as after training."""
    model = seeded(task.trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += _NOISE * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand(buffer.shape, generator=generator)
    return model


def built(task: ZooTask, model: nn.Module, directory: Path, **options: Any) -> Index:
    """The index of one checkpoint, of learning rate 1, so that TracIn's scores are plain inner products."""
    path = directory / "weights.pt"
    torch.save(task.state(model), path)
    return build_index(
        task, [Checkpoint(path, 1, 1.0)], directory / "index", progress=False, batch_size=BATCH, **options
    )


def gradients(task: ZooTask, measure: Loss, model: nn.Module, examples: Sequence[Any]) -> Tensor:
    """By autograd, one example at a time, in a batch of one. float64 [examples, parameters]."""
    return torch.stack([_gradient(model, measure, task.collate([example])) for example in examples])


def _gradient(model: nn.Module, measure: Loss, batch: Any) -> Tensor:
    """float64 [parameters]; a complex one counts as two. By `backward`, which reentrant checkpointing needs."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    losses = measure(model, batch)
    if losses.requires_grad:
        losses.sum().backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten().double() for g in found])


def agreement(task: ZooTask, queries: Sequence[Any], directory: Path, **options: Any) -> Agreement:
    """Of an index's scores with inner products of autograd's gradients."""
    model = trained_model(task)
    scores = built(task, model, directory, **{"basis": "none", "precision": "float16", **options}).scores(queries)
    model.eval()
    q = gradients(task, task.measurement, model, queries)
    g = gradients(task, task.loss, model, [task.train[row] for row in range(len(task.train))])
    return compared(np.asarray(scores, dtype=np.float64), q.numpy(), g.numpy())


def compared(scores: Any, q: Any, g: Any) -> Agreement:
    """scores: [queries, rows]; q: [queries, parameters]; g: [rows, parameters]."""
    expected = q @ g.T
    assert np.abs(expected).max() > 0, "every gradient of the case is zero"
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    error = np.abs(scores - expected) / np.maximum(norms, 1e-6 * norms.max())
    varied = expected.std(axis=1) > 1e-9 * np.abs(expected).max()
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores[varied], expected[varied], strict=True)]
    return Agreement(float(min(r)), float(error.max()))
