"""Every layer type, every way of using it: the fast path against vmap(grad) in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.data.batches import ExampleBatch, collate
from gradtrace.data.sample import sample_of
from gradtrace.gradients.capture import backpropagate
from gradtrace.gradients.path_choice import examine
from gradtrace.gradients.plan import GradientPath, PathChoice, plan_layers, trainable_names
from gradtrace.gradients.reference import gradients_reference, stray_gradients
from gradtrace.layers import Layer
from gradtrace.task import Task

pytestmark = pytest.mark.unit

TOLERANCE = 1e-4


class Conv1D(nn.Module):
    """transformers' Conv1D: a Linear with its weight transposed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"  # the registry goes by the full name, so that nothing is imported


class InputTask(Task):
    """Squared outputs of a model on (input, target) pairs: a loss that every weight moves."""

    train: Any = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def model(self) -> nn.Module:
        return self._model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, target = batch
        return (model(x).flatten(1).tanh() - target[:, None]).square().sum(1)


def planned_gradients(choice: PathChoice, model: nn.Module, task: Task, batch: ExampleBatch) -> dict[str, Tensor]:
    plan = plan_layers(model, choice)
    sums: dict[Layer, Tensor] = {}

    def add(layer: Layer, x: Any, d: Tensor) -> None:
        sums[layer] = sums.get(layer, torch.zeros(())) + layer.gradient(x, d)

    backpropagate(model, task.loss, batch, plan, add)
    strays: dict[Layer, list[Tensor]] = {}
    for layer, gradient in stray_gradients(model, task.loss, batch, plan.strays):
        strays.setdefault(layer, []).append(gradient)
    sums |= {layer: torch.cat(parts) for layer, parts in strays.items()}
    return {name: value for layer, total in sums.items() for name, value in layer.parameter_gradients(total).items()}


def batch_of(task: Task, examples: list[Any]) -> ExampleBatch:
    return collate(task, examples, torch.device("cpu"))


def examined(model: nn.Module, task: Task, examples: list[Any], names: list[str]) -> PathChoice:
    some = examples[:16]
    sample = sample_of(task, range(len(some)), some, torch.device("cpu"))
    return examine(model, [(task.loss, sample)], names)


def check(model: nn.Module, examples: list[Any], others: dict[str, GradientPath] | None = None) -> PathChoice:
    """Compare all parameters; `others` are those that are expected on another path than the factors of modules."""
    task = InputTask(model.eval())
    expected = gradients_reference(task, model, examples)
    names = trainable_names(model)
    model.requires_grad_(False)
    choice = examined(model, task, examples, names)
    assert {n: path for n, path in choice.paths.items() if path is not GradientPath.FACTORS} == (others or {})
    found = planned_gradients(choice, model, task, batch_of(task, examples))
    for name in names:
        got, wanted = found[name].reshape(expected[name].shape).double(), expected[name]
        assert wanted.norm() > 0, f"{name} is not exercised"
        assert (got - wanted).norm() <= TOLERANCE * wanted.norm(), name
    return choice


def examples_of(shape: tuple[int, ...], count: int, tokens: int | None = None) -> list[Any]:
    inputs = torch.randn(count, *shape) if tokens is None else torch.randint(0, tokens, (count, *shape))
    return list(zip(inputs, torch.randn(count), strict=True))


def trained_statistics(norm: nn.Module) -> nn.Module:
    """Norms as after training: no scale is one, no shift and no running mean zero."""
    for tensor in [*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]:
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear, leading dimensions": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "transformers Conv1D": (lambda: Conv1D(4, 6), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, (3, 2), bias=False), (3, 6, 7)),
    "conv2d strided": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), padding=2), (3, 8, 8)),
    "conv2d dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=(1, 2)), (3, 8, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 4, padding="same", dilation=2), (3, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 6, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", stride=2), (3, 7, 6)),
    "conv2d replicate, same": (
        lambda: nn.Conv2d(4, 4, 2, padding="same", padding_mode="replicate", groups=2),
        (4, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=1, stride=(1, 2, 1), dilation=(1, 1, 2)), (2, 5, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm of an image, no shift": (lambda: nn.LayerNorm((2, 3, 4), bias=False), (2, 3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(6, eps=1e-5), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 4)),
    "group norm, no positions": (lambda: nn.GroupNorm(3, 6), (6,)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(6), (6, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("case", CASES)
def test_layer_type(case: str, batch_size: int) -> None:
    torch.manual_seed(0)
    build, shape = CASES[case]
    check(trained_statistics(build()), examples_of(shape, batch_size))


@pytest.mark.parametrize("case", ["linear", "conv2d grouped", "group norm"])
def test_layer_after_an_in_place_activation(case: str) -> None:
    """The first layer's output is changed in place; what is tapped must be the gradient from before."""
    torch.manual_seed(0)
    build, shape = CASES[case]
    first, second = trained_statistics(build()), nn.LazyLinear(3)
    model = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), second, nn.Tanh())
    model(torch.randn(2, *shape))
    check(model, examples_of(shape, 7))


class TokenModel(nn.Module):
    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=padding_idx)
        self.output = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens).tanh().mean(1))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding(padding_idx: int | None, batch_size: int) -> None:
    torch.manual_seed(0)
    check(TokenModel(padding_idx), examples_of((6,), batch_size, tokens=11))


class Reused(nn.Module):
    """One module used twice, and its weight and bias shared with another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twin = nn.Linear(5, 5), nn.Linear(5, 5)
        self.twin.weight, self.twin.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.first(self.first(x).relu()).tanh())


class Tied(nn.Module):
    """The embedding's table is the output layer's weight: shared in different roles."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(11, 5), nn.Linear(5, 11)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens).mean(1))


class UsedOutside(nn.Module):
    """A weight used in the layer's forward and once more outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).tanh(), self.layer.weight) * self.scale


def calls(*names: str) -> dict[str, GradientPath]:
    return dict.fromkeys(names, GradientPath.CALLS)


def test_shared_modules_are_summed() -> None:
    torch.manual_seed(0)
    model = Reused()
    assert len(plan_layers(model, check(model, examples_of((5,), 7))).layers) == 1


def test_weights_shared_in_different_roles() -> None:
    torch.manual_seed(0)
    check(Tied(), examples_of((4,), 7, tokens=11), calls("embedding.weight", "output.bias"))


def test_weight_used_outside_of_its_module() -> None:
    torch.manual_seed(0)
    check(UsedOutside(), examples_of((5,), 7), calls("layer.weight", "layer.bias") | {"scale": GradientPath.MODULE})


def test_attention_whose_projections_bypass_their_modules() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    inside = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    check(encoder, examples_of((3, 8), 7), calls(*(f"self_attn.{name}" for name in inside)))


@pytest.mark.parametrize("frozen", [[], ["linear1"], ["norm1", "norm2", "linear1", "linear2"]])
def test_attention_is_not_fused_where_nothing_before_it_needs_a_gradient(frozen: list[str]) -> None:
    """nn.TransformerEncoder's inference kernel would bypass the layers inside."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    for name in frozen:
        encoder.layers[0].get_submodule(name).requires_grad_(False)
    inside = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    check(encoder, examples_of((3, 8), 7), calls(*(f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in inside)))


def test_frozen_parameters_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    choice = check(model, examples_of((5,), 7), calls("2.bias"))
    assert [layer.names for layer in plan_layers(model, choice).layers] == [("2.bias",)]


def test_padding_does_not_change_a_row() -> None:
    """The same sentence alone and padded next to a longer one."""
    torch.manual_seed(0)
    model = TokenModel(padding_idx=0).eval().requires_grad_(False)
    model.output.requires_grad_(True), model.embedding.requires_grad_(True)
    names = trainable_names(model)
    model.requires_grad_(False)

    class Masked(InputTask):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            tokens, target = batch
            mask = (tokens > 0).unsqueeze(-1)
            mean = (model.embedding(tokens) * mask).sum(1) / mask.sum(1)
            return (model.output(mean).tanh() - target[:, None]).square().sum(1)

        def collate(self, examples: list[Any]) -> Any:
            padded = nn.utils.rnn.pad_sequence([tokens for tokens, _ in examples], batch_first=True)
            return padded, torch.stack([target for _, target in examples])

    examples = [(torch.tensor([4, 9, 2]), torch.tensor(0.3)), (torch.tensor([1, 2, 3, 4, 5]), torch.tensor(-0.2))]
    task = Masked(model)
    choice = examined(model, task, examples, names)
    alone = planned_gradients(choice, model, task, batch_of(task, examples[:1]))
    beside = planned_gradients(choice, model, task, batch_of(task, examples))
    for name, wanted in alone.items():
        torch.testing.assert_close(beside[name][:1], wanted, rtol=TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 4)).eval().to(dtype)
    examples = [(x.to(dtype), y.to(dtype)) for x, y in examples_of((2, 6, 6), 5)]
    task = InputTask(model)
    expected = gradients_reference(task, model, examples)
    names = trainable_names(model)
    model.requires_grad_(False)
    found = planned_gradients(examined(model, task, examples, names), model, task, batch_of(task, examples))
    tolerance = 1e-10 if dtype == torch.float64 else 0.05  # bfloat16's own rounding in the two passes
    for name in names:
        difference = found[name].reshape(expected[name].shape).double() - expected[name]
        assert difference.norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("case", ["linear", "transformers Conv1D", "conv2d grouped", "layer norm", "batch norm 2d"])
def test_a_bias_that_does_not_count_leaves_its_weight_on_the_fast_path(case: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[case]
    layer = trained_statistics(build())
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    check(layer, examples_of(shape, 7))
