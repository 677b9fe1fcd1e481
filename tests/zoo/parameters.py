"""Parameters outside of plain layers: bare, 0-d, shared by function, reparametrised, adapters by hand."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import OwnScale
from zoo.case import ZooTask, right, right_or_refused
from zoo.data import VOCABULARY, Residual, generator, labelled, lengths, mlp, pad, texts

ROWS = labelled(6)


class Temperature(nn.Module):
    """A 0-d parameter, as CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = mlp(), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale.exp()


@right(rotates=True)
def scalar_temperature() -> ZooTask:
    return ZooTask(Temperature, ROWS)


class ReZero(nn.Module):
    """One gate for each residual block, zero at the start; the gates are a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for gate, block in zip(self.gates, self.blocks, strict=True):
            x = x + gate * block(x).tanh()
        return self.head(x)


@right()
def rezero_gates_in_a_parameter_list() -> ZooTask:
    return ZooTask(ReZero, ROWS)


class OnlyScalars(nn.Module):
    """Nothing but a global mean, and biases of users and items."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.user, self.item = (
            nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(9))
        )  # fmt: skip

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.mean + self.user[user] + self.item[item]


def ratings() -> list[tuple[int, int, float]]:
    drawn = generator()
    users, items = (torch.randint(n, (40,), generator=drawn).tolist() for n in (8, 9))
    return list(zip(users, items, torch.randn(40, generator=drawn).tolist(), strict=True))


def rating_loss(m: nn.Module, b: Any) -> Tensor:
    return (m(b[0], b[1]) - b[2].float()).square()


@right()
def recommender_of_biases_alone() -> ZooTask:
    return ZooTask(OnlyScalars, ratings(), rating_loss)


class Factorisation(OnlyScalars):
    """Matrix factorisation; the embeddings write sparse gradients when trained."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(8, 4, sparse=True), nn.Embedding(9, 4, sparse=True)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return super().forward(user, item) + (self.users(user) * self.items(item)).sum(1)


@right()
def matrix_factorisation_with_sparse_embeddings() -> ZooTask:
    return ZooTask(Factorisation, ratings(), rating_loss)


class Einsum(nn.Module):
    """No parameter is used by its module's forward."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 6, 5) * 0.2)
        self.out: Any = nn.Linear(10, 3) if module else nn.ParameterDict({"weight": torch.randn(3, 10) * 0.2})

    def forward(self, x: Tensor) -> Tensor:
        weight = self.out.weight if isinstance(self.out, nn.Linear) else self.out["weight"]
        return F.linear(torch.einsum("bi,kio->bko", x, self.kernel).relu().flatten(1), weight)


right("einsum_and_parameter_dict")(lambda: ZooTask(lambda: Einsum(False), ROWS))
right("weight_of_a_linear_used_by_a_function")(lambda: ZooTask(lambda: Einsum(True), ROWS))


class BothWays(nn.Module):
    """A layer is called, and its weight is used once more by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.a(x).tanh(), self.a.weight))


@right()
def weight_used_by_its_layer_and_by_a_function() -> ZooTask:
    return ZooTask(BothWays, ROWS)


class Regularised(nn.Module):
    """Weights are used without an input: the same term in every example's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@right()
def weight_decay_in_the_loss() -> ZooTask:
    def loss(m: nn.Module, b: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in m.parameters())
        return F.cross_entropy(m(b[0]), b[1], reduction="none") + 0.01 * penalty

    return ZooTask(Regularised, ROWS, loss)


class Siamese(nn.Module):
    """One tower, three inputs: anchor, positive, negative."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [F.normalize(self.tower(x), dim=1) for x in inputs]


@right(rotates=True)
def siamese_triplets() -> ZooTask:
    rows = [(ROWS[i][0], ROWS[(i + 7) % 40][0], ROWS[(i + 13) % 40][0]) for i in range(40)]
    loss = lambda m, b: F.triplet_margin_loss(*m(*b), margin=2.0, reduction="none")  # noqa: E731
    return ZooTask(Siamese, rows, loss)


def reused() -> nn.Module:
    """The same block three times in a row, as in ALBERT."""
    block = Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)))
    return nn.Sequential(block, block, block, nn.Linear(6, 3))


@right(rotates=True)
def block_used_three_times() -> ZooTask:
    return ZooTask(reused, ROWS)


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pair = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6)), nn.Bilinear(6, 6, 3)
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(self.pair(self.body(x), x))


@right()
def bilinear_and_prelu() -> ZooTask:
    return ZooTask(BilinearPair, ROWS)


class MaxNorm(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8, padding_idx=0, **options), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.embed(x) * (x != 0)[..., None]).sum(1))


@right_or_refused("max_norm", "renorm|without max_norm|remove")
def embedding_with_max_norm() -> ZooTask:
    """Every forward pass writes to the weights."""
    return ZooTask(lambda: MaxNorm(max_norm=1.0), texts(), collate=pad)


@right_or_refused("scale_grad_by_freq", "scale_grad_by_freq=False|without|switch")
def embedding_with_gradients_scaled_by_frequency() -> ZooTask:
    rows = [(torch.arange(1, 6), 0), (torch.arange(6, 11), 1), *texts(lengths())[2:]]
    return ZooTask(lambda: MaxNorm(scale_grad_by_freq=True), rows, collate=pad)


class Fourier(nn.Module):
    """Complex weights on the lowest frequencies, as in Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(self.mix(x)) * self.weight, n=6).tanh())


@right_or_refused("complex", "real|freeze|requires_grad_")
def complex_weights() -> ZooTask:
    return ZooTask(Fourier, ROWS)


class RootMeanSquare(nn.Module):
    """A norm of somebody's own, with 1 + weight, as in Gemma."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.full((width,), 1.0 - offset)), offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return ((self.offset + self.weight) * normed).type_as(x)


for offset in (0.0, 1.0):
    right(f"rms_norm_of_ones_own{'_with_offset' if offset else ''}")(
        lambda offset=offset: ZooTask(
            lambda: nn.Sequential(nn.Linear(8, 8), RootMeanSquare(8, offset), nn.Flatten(), nn.Linear(40, 3)),
            labelled(5, 8),
        )
    )


@right()
def autograd_function_of_ones_own() -> ZooTask:
    return ZooTask(lambda: nn.Sequential(nn.Linear(6, 8), OwnScale(8), nn.ReLU(), nn.Linear(8, 3)), ROWS)


class Unused(nn.Module):
    """A layer that nothing reaches, and one that is only evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.watched = mlp(), nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.watched(x)
        return self.body(x) + shift.detach()


@right()
def layers_that_the_loss_does_not_reach() -> ZooTask:
    return ZooTask(Unused, ROWS)


class Hyper(nn.Module):
    """A network makes the weights of another, for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.base = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x).view(-1, 3, 6) + self.base.weight
        return torch.einsum("boi,bi->bo", weight, x) + self.base.bias


@right()
def hypernetwork() -> ZooTask:
    return ZooTask(Hyper, ROWS)


class Ensemble(nn.Module):
    """Stacked members that are evaluated by torch.func, from parameters stacked along a first dimension."""

    def __init__(self) -> None:
        super().__init__()
        members = [mlp() for _ in range(3)]
        self.skeleton = [copy.deepcopy(members[0]).to("meta")]  # in a list: not a module of this one
        stacked, _ = torch.func.stack_module_state(members)
        self.names = list(stacked)
        self.weights = nn.ParameterList([nn.Parameter(value.detach()) for value in stacked.values()])

    def forward(self, x: Tensor) -> Tensor:
        one = partial(torch.func.functional_call, self.skeleton[0])
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.vmap(lambda state: one(state, (x,)))(weights).mean(0)


@right()
def ensemble_by_vmap() -> ZooTask:
    return ZooTask(Ensemble, ROWS)
