"""Tasks that must be refused for other reasons: randomness, reduced or detached losses, data without fixed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.case import ZooTask, refused, seeded
from zoo.data import labelled, mlp
from zoo.mixing import losses_of

ROWS = labelled(6)


class Dropping(nn.Module):
    """Dropout that is always on, in inputs of a certain kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.head(torch.where(x[:, :1] > 0, F.dropout(h, 0.5), h))


@refused(r"random", r"deterministic|self\.training")
def dropout_that_is_always_on() -> ZooTask:
    return ZooTask(Dropping, sorted(ROWS, key=lambda row: bool(row[0][0] > 0)))


@refused(r"random", r"deterministic|noise")
def noise_in_the_loss() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return losses_of(m, (b[0] + 0.1 * torch.randn_like(b[0]) * (b[1] == 2)[:, None], b[1]))

    return ZooTask(mlp, sorted(ROWS, key=lambda row: row[1]), loss)


class Stateful(nn.Module):
    """Goes on with the hidden state of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)
        self.state = torch.zeros(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.state.expand(len(x), -1))
        self.state = h.detach().mean(0, keepdim=True)
        return self.head(h)


@refused(r"differ|random|between (two )?calls", r"deterministic|state")
def model_that_remembers_the_call_before() -> ZooTask:
    return ZooTask(Stateful, ROWS)


@refused(r"shape|reduc", r"reduction")
def mean_reduced_loss() -> ZooTask:
    return ZooTask(mlp, ROWS, lambda m, b: F.cross_entropy(m(b[0]), b[1]))


@refused(r"shape|reduc", r"reduction|reduce|average")
def loss_of_each_token() -> ZooTask:
    return ZooTask(mlp, labelled(5, 6), lambda m, b: m(b[0]).square().sum(-1))


OTHER = seeded(mlp)


@refused(r"does not depend|another model|another instance", r"passed in|model that|argument")
def loss_of_another_model() -> ZooTask:
    return ZooTask(mlp, ROWS, lambda m, b: losses_of(OTHER, b))


@refused(r"does not depend|no_grad|detach", r"no_grad|detach")
def loss_under_no_grad() -> ZooTask:
    return ZooTask(mlp, ROWS, torch.no_grad()(losses_of))


@refused(r"does not depend|detach", r"detach")
def detached_loss() -> ZooTask:
    return ZooTask(mlp, ROWS, lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1], reduction="none"))


@refused(r"does not depend|detach|no_grad", r"detach|differentiable|argmax|no_grad")
def loss_without_a_derivative() -> ZooTask:
    return ZooTask(mlp, ROWS, lambda m, b: (m(b[0]).argmax(1) != b[1]).float())


@refused(r"requires? a gradient|frozen|requires_grad", r"gradient|requires_grad")
def everything_frozen() -> ZooTask:
    return ZooTask(lambda: mlp().requires_grad_(False), ROWS)


@refused(r"NaN|infinite", r"row\S* .*17")
def loss_that_is_not_a_number() -> ZooTask:
    rows = [(torch.full((6,), torch.nan) if row == 17 else x, y) for row, (x, y) in enumerate(ROWS)]
    return ZooTask(mlp, rows)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


class Augmented(Dataset):  # type: ignore[type-arg]
    """Random noise, from the fourth row on."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> Any:
        x, y = ROWS[row]
        return (x + 0.01 * torch.randn(6) if row > 3 else x), y


for name, train, cause, remedy in (
    ("stream_as_data_set", Stream(), "IterableDataset|map-style", r"len|map-style"),
    ("loader_as_data_set", DataLoader(ROWS, shuffle=True), "DataLoader", r"\.dataset"),  # type: ignore[arg-type]
    ("generator_as_data_set", (row for row in ROWS), "map-style", r"len|list"),
    ("no_rows", [], "empty", r"empty"),
    ("random_augmentation", Augmented(), "augmentation|differs", r"switch|augmentation"),
):
    refused(cause, remedy, name=name)(lambda train=train: ZooTask(mlp, train))
