"""Weights that are computed from others: normalised, pruned, low-rank adapters, soft prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from zoo.case import ZooTask, right
from zoo.data import VOCABULARY, labelled, mlp, pad, texts

ROWS = labelled(6)


def weight_normed(old: bool) -> nn.Module:
    wrap: Any = nn.utils.weight_norm if old else parametrizations.weight_norm
    return nn.Sequential(
        wrap(nn.Linear(6, 8)), nn.ReLU(), nn.Unflatten(1, (2, 4)), wrap(nn.Conv1d(2, 3, 4)), nn.Flatten()
    )


right("weight_norm_old")(lambda: ZooTask(lambda: weight_normed(True), ROWS))
right("weight_norm_new")(lambda: ZooTask(lambda: weight_normed(False), ROWS))


def spectral_normed(old: bool) -> nn.Module:
    wrap: Any = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    return nn.Sequential(wrap(nn.Linear(6, 8)), nn.LeakyReLU(), nn.Linear(8, 3))


right("spectral_norm_old")(lambda: ZooTask(lambda: spectral_normed(True), ROWS))
right("spectral_norm_new")(lambda: ZooTask(lambda: spectral_normed(False), ROWS))


def pruned(kind: str) -> nn.Module:
    model = mlp()
    if kind == "structured":
        prune.ln_structured(model[0], "weight", 0.4, n=2, dim=0)
    else:
        prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.5)
    if kind == "removed":
        prune.remove(model[0], "weight")
        prune.remove(model[2], "weight")
    return model


for kind in ("unstructured", "structured", "removed"):
    right(f"pruned_{kind}")(lambda kind=kind: ZooTask(lambda: pruned(kind), ROWS))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


@right()
def weight_with_a_parametrisation_of_its_own() -> ZooTask:
    def make() -> nn.Module:
        layer = nn.Linear(6, 6)
        parametrize.register_parametrization(layer, "weight", Symmetric())
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))

    return ZooTask(make, ROWS)


class LoRA(nn.Module):
    """A frozen layer and a trained product of two thin ones (Hu et al. 2021), as modules or as bare parameters."""

    def __init__(self, layer: nn.Linear, modules: bool, rank: int = 2) -> None:
        super().__init__()
        self.layer, self.modules_ = layer.requires_grad_(False), modules
        if modules:
            self.a: Any = nn.Linear(layer.in_features, rank, bias=False)
            self.b: Any = nn.Linear(rank, layer.out_features, bias=False)
        else:
            self.a = nn.Parameter(torch.randn(layer.in_features, rank) * 0.1)
            self.b = nn.Parameter(torch.zeros(rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * (self.b(self.a(x)) if self.modules_ else x @ self.a @ self.b)


for modules in (True, False):
    right(f"lora_by_hand_as_{'modules' if modules else 'parameters'}", rotates=modules)(
        lambda modules=modules: ZooTask(
            lambda: nn.Sequential(LoRA(nn.Linear(6, 8), modules), nn.ReLU(), LoRA(nn.Linear(8, 3), modules)), ROWS
        )
    )


class SoftPrompt(nn.Module):
    """A frozen encoder; only vectors put before the input, and biases, are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.requires_grad_(False)
        self.head.bias.requires_grad_(True)
        self.body.linear1.bias.requires_grad_(True)
        self.prompt = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.prompt.expand(len(x), -1, -1), self.embed(x)], dim=1)
        padding = F.pad(x == 0, (2, 0))
        return self.head(self.body(h, src_key_padding_mask=padding)[:, 0])


@right()
def soft_prompt_and_biases_alone() -> ZooTask:
    return ZooTask(SoftPrompt, texts(), collate=pad)
