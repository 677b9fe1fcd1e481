"""The strongest whitened coordinates against those of whole gradients by vmap in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from conftest import examples
from gradtrace import CurvatureError, MismatchError, Task
from gradtrace.errors import LossError, UnsupportedLayerError
from gradtrace.gradients.reference import gradients_reference
from gradtrace.layers import base
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.coordinates import WeightCoordinates
from gradtrace.sparse.strongest import Strongest, StrongestOfEach
from gradtrace.sparse.vectors import LARGEST_COORDINATE, SparseVectors, check_coordinates
from gradtrace.sparse.whitening import gradient_squares, whitening_factors
from test_full_gradients import MODELS as ALL_MODELS
from test_full_gradients import FixedTask
from test_layers import examples_of, trained_statistics
from tiny import PairTask
from zoo.adapters import adapted

pytestmark = pytest.mark.unit


class TiedTokens(nn.Module):
    """A language model whose embedding is its output layer; every position predicts each token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.mix(self.words(tokens)))
        return (hidden @ self.words.weight.T).flatten(1)


def lora() -> nn.Module:
    return adapted(tiny.mlp(), "LoraConfig", target_modules=["0", "2"], r=2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int | None]] = {
    **ALL_MODELS,
    "tied tokens": (TiedTokens, (5,), 11),
    "LoRA": (lora, (5,), None),
}


def prepared(case: str, directory: Path) -> tuple[GradientModel, list[Any]]:
    torch.manual_seed(0)
    build, shape, tokens = MODELS[case]
    if case == "LoRA":
        pytest.importorskip("peft")
    rows = examples_of(shape, 9, tokens)
    if case == "double":
        rows = [(x.double(), y.double()) for x, y in rows]
    task = FixedTask(trained_statistics(build()).eval(), rows)
    return GradientModel(task, tiny.checkpoints(task, directory, count=1)[0], torch.device("cpu"), rows[:2]), rows


def by_coordinate(model: GradientModel, exact: dict[str, Tensor]) -> Tensor:
    """Gradients by parameter name, [batch, *shape], in the order of the layers. float64 [batch, coordinates]."""
    columns = []
    for layer in model.plan.layers:
        numbers = layer.parameter_gradients(torch.arange(layer.size).view(1, layer.groups, layer.outputs, layer.inputs))
        of_layer = torch.zeros(len(next(iter(exact.values()))), layer.size, dtype=torch.float64)
        for name, numbered in numbers.items():
            of_layer[:, numbered.flatten()] = exact[name].flatten(1)
        columns.append(of_layer)
    return torch.cat(columns, dim=1)


def reference(model: GradientModel, rows: list[Any]) -> Tensor:
    trained = model.task.model()
    trained.load_state_dict(model.model.state_dict())
    return by_coordinate(model, gradients_reference(model.task, trained, rows))


def exact_whitening(model: GradientModel, squares: Tensor, damping: float) -> Tensor:
    """By the formula. squares: [coordinates]"""
    by_layer = squares.split([layer.size for layer in model.plan.layers])
    return torch.cat([torch.nan_to_num((v + damping * v.mean()).rsqrt(), posinf=0.0) for v in by_layer])


def fitted(model: GradientModel, batches: list[list[Any]], damping: float = 1.0) -> Tensor:
    """float32 [coordinates]"""
    squares = gradient_squares(model, map(model.batch, batches))
    names = [layer.name for layer in model.plan.layers]
    numbers = torch.tensor([sorted(names).index(name) for name in names])
    means = squares["layer_means"][numbers.repeat_interleave(torch.tensor([layer.size for layer in model.plan.layers]))]
    return whitening_factors(squares["eigenvalues"], means, damping)


def is_strongest(found: SparseVectors, whitened: Tensor, count: int) -> None:
    """Up to rounding: values are right, nothing that is left out is larger, and nothing is there twice."""
    for kept, values, row in zip(found.coordinates.astype(np.int64), found.values, whitened.numpy(), strict=True):
        assert len(kept) == count
        kept, values = kept[values != 0], values[values != 0]
        assert (np.diff(kept) > 0).all()
        scale = np.abs(row).max(initial=0)
        np.testing.assert_allclose(values, row[kept], rtol=1e-3, atol=1e-5 * scale)
        others = np.delete(np.abs(row), kept)
        if len(kept) < count:
            assert others.max(initial=0) <= 1e-6 * scale
        else:
            assert others.max(initial=0) <= np.abs(row[kept]).min() * (1 + 1e-3) + 1e-5 * scale


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("case", MODELS)
def test_they_are_those_of_the_whole_gradient(
    case: str, pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = prepared(case, tmp_path)
    if pieces:
        monkeypatch.setattr(base, "SLICE_VALUES", 300)
    gradients = reference(model, rows)
    factors = fitted(model, [rows[:5], rows[5:]], damping=0.5)
    expected = exact_whitening(model, gradients.square().mean(0), damping=0.5)
    torch.testing.assert_close(factors.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    for count in (1, 7, gradients.shape[1]):
        found, losses = StrongestOfEach(factors, count).encode(model, model.batch(rows), None)
        is_strongest(found.vectors, gradients * factors.double(), count)
        torch.testing.assert_close(losses, model.losses(model.batch(rows)))
        np.testing.assert_allclose(found.norms, gradients.norm(dim=1), rtol=1e-3)


def test_only_rows_of_tokens_that_occur_are_formed(tmp_path: Path) -> None:
    task = PairTask(lambda: nn.Sequential(nn.Embedding(10_000, 3), nn.Flatten(), nn.Linear(6, 3)), [])
    task.train = [(torch.tensor([5, 9_999]), 0), (torch.tensor([7, 7]), 1)]
    model = GradientModel(task, tiny.checkpoints(task, tmp_path, 1)[0], torch.device("cpu"), task.train)
    layer = model.plan.layers[0]
    tokens = torch.tensor([[5, 9_999], [7, 7]])
    support = layer.support([(tokens, torch.zeros(2, 2, 3))])
    assert support is not None
    assert support.tolist() == [10_000 * row + token for row in range(3) for token in (5, 7, 9_999)]


@settings(max_examples=examples(200), deadline=None)
@given(data=st.data(), count=st.integers(1, 12), examples=st.integers(1, 4), step=st.integers(1, 4))
def test_of_equally_large_ones_the_lower_come_first(data: st.DataObject, count: int, examples: int, step: int) -> None:
    """Whole numbers, many of them equal, in layers of several sizes; against sorting."""
    seed, widths = (
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)),
    )
    rng = np.random.default_rng(seed)
    largest = data.draw(st.sampled_from([0, 1, 3, 1000]))
    total = sum(widths)
    dense = rng.integers(-largest, largest + 1, (examples, total)).astype(np.float32)
    strongest = Strongest(examples, count)
    for number in rng.permutation(len(widths)):
        first, width = sum(widths[:number]), widths[number]
        for start in range(0, examples, step):
            piece = slice(start, start + step)
            values = torch.from_numpy(dense[piece, first : first + width])
            positions = torch.arange(width) if number % 2 else None
            strongest.add(piece, first, positions, values)
    found = strongest.vectors()
    for row, kept, values in zip(dense, found.coordinates, found.values, strict=True):
        order = sorted((-abs(value), place) for place, value in enumerate(row.tolist()) if value)[:count]
        expected = sorted(place for _, place in order)
        fill = count - len(expected)
        assert kept.tolist() == expected + [LARGEST_COORDINATE] * fill
        assert values.tolist() == [row[place] for place in expected] + [0.0] * fill


def test_nothing_is_kept_of_no_layers() -> None:
    assert not Strongest(3, 2).vectors().values.any()


def test_coordinates_of_other_layers_are_refused(tmp_path: Path) -> None:
    model, _ = prepared("embedding", tmp_path)
    coordinates = WeightCoordinates.of(model.plan.layers)
    coordinates.check(model.plan.layers)
    for strange in (
        dict(list(coordinates.shapes.items())[:-1]),
        dict(reversed(coordinates.shapes.items())),
        {name: (groups, inputs, outputs) for name, (groups, outputs, inputs) in coordinates.shapes.items()},
    ):
        with pytest.raises(MismatchError, match="other layers"):
            WeightCoordinates(strange).check(model.plan.layers)


def test_gradients_that_say_nothing_are_refused(tmp_path: Path) -> None:
    def task(scale: float) -> Task:
        return PairTask(tiny.mlp, tiny.classes(4), lambda model, batch: model(batch[0]).flatten(1).sum(1) * scale)

    checkpoints = tiny.checkpoints(task(1.0), tmp_path, 1)
    zero, one = (GradientModel(task(s), checkpoints[0], torch.device("cpu"), tiny.classes(4)) for s in (0.0, 1.0))
    with pytest.raises(CurvatureError, match="gradients of all examples are zero"):
        fitted(zero, [tiny.classes(4)])
    factors = fitted(one, [tiny.classes(4)])
    found, _ = StrongestOfEach(factors, 3).encode(zero, zero.batch(tiny.classes(4)), None)
    assert not found.vectors.values.any()
    with pytest.raises(LossError, match="whitened gradient"):
        StrongestOfEach(factors * torch.inf, 3).encode(one, one.batch(tiny.classes(4)), None)


def test_more_weights_than_32_bits_can_number_are_refused() -> None:
    check_coordinates(2**32)
    with pytest.raises(UnsupportedLayerError, match="choose some of them with Task"):
        check_coordinates(2**32 + 1)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    model, rows = prepared("text", tmp_path)

    def once() -> tuple[bytes, bytes]:
        found, _ = StrongestOfEach(fitted(model, [rows]), 20).encode(model, model.batch(rows), None)
        return found.vectors.coordinates.tobytes(), found.vectors.values.tobytes()

    assert once() == once()
