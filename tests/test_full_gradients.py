"""Inner products of full gradients, from factors or from whole gradients, against float64 gradients by vmap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace.gradients.reference import gradients_reference
from gradtrace.layers import Layer, base
from gradtrace.models.full_gradients import FullGradients, full_gradients
from gradtrace.models.gradient_model import GradientModel
from test_layers import CASES, Conv1D, InputTask, Reused, Tied, TokenModel, UsedOutside, examples_of, trained_statistics
from tiny import PairTask

pytestmark = pytest.mark.unit

Build = Callable[[], nn.Module]


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        trained_statistics(nn.BatchNorm2d(6)),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def text() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=0), Conv1D(5, 6), nn.Tanh(), nn.LayerNorm(5), nn.Flatten())


MODELS: dict[str, tuple[Build, tuple[int, ...], int | None]] = {
    **{name: (build, shape, None) for name, (build, shape) in CASES.items()},
    "reused and shared": (Reused, (5,), None),
    "tied, left to vmap": (Tied, (4,), 11),
    "used outside, left to vmap": (UsedOutside, (5,), None),
    "embedding": (lambda: TokenModel(None), (6,), 11),
    "embedding with padding": (lambda: TokenModel(3), (6,), 11),
    "attention, part left to vmap": (attention, (3, 8), None),
    "convolutions": (convolutions, (3, 6, 6), None),
    "text": (text, (7,), 11),
    "double": (lambda: nn.Linear(5, 3).double(), (5,), None),
}


class FixedTask(InputTask):
    """The loss that every weight moves, on data of its own."""

    def __init__(self, model: nn.Module, train: Any) -> None:
        super().__init__(model)
        self.train = train


def prepared(case: str, directory: Path) -> tuple[GradientModel, list[Any], list[Any]]:
    torch.manual_seed(0)
    build, shape, tokens = MODELS[case]
    model = trained_statistics(build()) if case in CASES else build()
    rows, queries = examples_of(shape, 9, tokens), examples_of(shape, 4, tokens)
    if case == "double":
        rows, queries = ([(x.double(), y.double()) for x, y in some] for some in (rows, queries))
    task = FixedTask(model.eval(), rows)
    checkpoint = tiny.checkpoints(task, directory, count=1)[0]
    return GradientModel(task, checkpoint, torch.device("cpu"), rows[:2]), rows, queries


def flat_reference(model: GradientModel, examples: list[Any]) -> Tensor:
    trained = model.task.model()
    trained.load_state_dict(model.model.state_dict())
    return tiny.flat(gradients_reference(model.task, trained, examples))


def agrees(found: FullGradients, others: FullGradients, mine: Tensor, theirs: Tensor) -> None:
    products = sum(found.inner_products(others).values())
    assert isinstance(products, Tensor)
    error = (products.double() - mine @ theirs.T).abs()
    assert (error <= 1e-4 * mine.norm(dim=1)[:, None] * theirs.norm(dim=1)).all()
    torch.testing.assert_close(found.squared_norms(), mine.square().sum(1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("cheaper", [None, True, False], ids=["as chosen", "factors", "whole gradients"])
@pytest.mark.parametrize("case", MODELS)
def test_inner_products(case: str, cheaper: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way is taken, and in pieces of a few examples."""
    model, rows, queries = prepared(case, tmp_path)
    mine, theirs = flat_reference(model, queries), flat_reference(model, rows)
    if cheaper is not None:
        monkeypatch.setattr(Layer, "_factors_are_cheaper", lambda *_: cheaper)
        monkeypatch.setattr(base, "SLICE_VALUES", 300)
    asked, others = (full_gradients(model, model.batch(some)) for some in (queries, rows))
    agrees(asked, others, mine, theirs)
    agrees(others, asked, theirs, mine)


def test_products_by_layer_are_those_of_the_layers_parameters(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, tiny.classes(8))
    model = GradientModel(task, tiny.checkpoints(task, tmp_path, 1)[0], torch.device("cpu"), task.train[:2])
    trained = tiny.loaded(task, tiny.checkpoints(task, tmp_path, 1)[0])
    exact = gradients_reference(task, trained, task.train)
    found = full_gradients(model, model.batch(task.train))
    for name, products in found.inner_products(found).items():
        own = tiny.flat({key: value for key, value in exact.items() if key.rpartition(".")[0] == name})
        torch.testing.assert_close(products.double(), own @ own.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", [1, 500])
def test_products_are_the_same_whether_positions_are_few_or_many(positions: int) -> None:
    """The factors of few are compared two by two, those of many are summed to whole gradients first."""
    layer = base.layer_type_of(nn.Linear(50, 40))(nn.Linear(50, 40), ["weight", "bias"])  # type: ignore[misc]
    x, d = torch.randn(3, positions, 50), torch.randn(3, positions, 40)
    whole = torch.einsum("bpo,bpi->boi", d.double(), torch.cat([x, torch.ones(3, positions, 1)], dim=2).double())
    products = whole.flatten(1) @ whole.flatten(1).T
    torch.testing.assert_close(layer.inner_products([(x, d)], [(x, d)]).double(), products, rtol=1e-4, atol=1e-2)


def test_tiny_gradients_have_norms(tmp_path: Path) -> None:
    """Whose squares float32 cannot hold."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).flatten() * batch[1]

    task = PairTask(lambda: nn.Linear(5, 1, bias=False), [(torch.ones(5), torch.tensor(s)) for s in (1.0, 1e-25)], loss)
    model = GradientModel(task, tiny.checkpoints(task, tmp_path, 1)[0], torch.device("cpu"), task.train)
    found = full_gradients(model, model.batch(task.train)).squared_norms()
    torch.testing.assert_close(found, torch.tensor([5.0, 5e-50], dtype=torch.float64), rtol=1e-5, atol=0)
