"""The laws that are read from a loss, against Jacobians and Hessians by torch.func in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from gradtrace import random_numbers
from gradtrace.gradients.reference import vmapped_gradients
from gradtrace.labels import laws as output_laws
from gradtrace.labels.interception import differentiable
from gradtrace.labels.laws import Draws, Law
from gradtrace.labels.loss_analysis import LossSample, analyse_loss
from gradtrace.labels.sampled_gradients import LossOutputs, SeededLoss

pytestmark = pytest.mark.unit

Function = Callable[[Tensor, Tensor], Tensor]  # (outputs [batch, *shape], labels [batch, ...]) -> losses [batch]


class Network(nn.Module):
    """Outputs of some shape for each example."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.hidden, self.last = nn.Linear(4, 3), nn.Linear(3, math.prod(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).tanh()).reshape(len(x), *self.shape)


class Case:
    """A loss on three examples."""

    def __init__(self, shape: tuple[int, ...], labels: Tensor, function: Function) -> None:
        torch.manual_seed(3)
        self.model = Network(*shape).double().eval().requires_grad_(False)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.inputs, self.labels, self.function = torch.randn(3, 4).double(), labels, function

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.function(model(batch[0]), batch[1])

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.labels

    def alone(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row : row + 1], self.labels[row : row + 1]

    def examined(self) -> LossOutputs | str:
        return analyse_loss(LossSample(self.loss, self.model, self.names, self.batch, lambda: self.alone(0)))

    def outputs(self) -> LossOutputs:
        found = self.examined()
        assert isinstance(found, LossOutputs), found
        return found

    def gradients(self, measure: SeededLoss, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of each example, all of them together in one batch. [batch, parameters]"""
        with differentiable(self.model, self.names) as parameters:
            losses = measure(self.model, batch)
            torch.testing.assert_close(losses, self.loss(self.model, batch))
            rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([own.flatten() for own in row]) for row in rows])

    def gauss_newton(self, row: int) -> Tensor:
        """J^T H J, H the Hessian of the example's loss in its outputs. [parameters, parameters]"""
        x, y = self.alone(row)
        jacobians = jacrev(lambda own: functional_call(self.model, own, (x,))[0])(dict(self.model.named_parameters()))
        outputs = self.model(x)[0]
        jacobian = torch.cat([jacobians[name].reshape(outputs.numel(), -1) for name in self.names], dim=1)
        second = jacrev(jacrev(lambda f: self.function(f[None], y)[0]))(outputs).reshape(outputs.numel(), -1)
        return jacobian.T @ second @ jacobian


def spread(*values: float) -> list[int]:
    """Random integers whose uniform number is in the middle of each stretch of a partition by these lengths."""
    ends = np.cumsum(values)
    return [int((end - value / 2) * 2**53) << 11 for end, value in zip(ends, values, strict=True)]


def signed(integer: int) -> int:
    return integer - 2**64 if integer >= 2**63 else integer


def possible(law: Law, outputs: Tensor) -> list[list[tuple[float, int]]]:
    """For each label of a call, the draws with their probabilities: its classes, or two bits for the signs."""
    if isinstance(law, output_laws.Categorical):
        scores = outputs.movedim(law.dim, -1).flatten(0, -2)
        chances = (scores.exp() if law.normalized else scores.softmax(-1)).tolist()
        return [list(zip(row, map(signed, spread(*row)), strict=True)) for row in chances]
    return [[(0.25, signed(bits << 62)) for bits in range(4)]] * outputs.numel()


def expected_square(case: Case, row: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The mean of g gT over everything that can be drawn for an example. [parameters, parameters]"""
    outputs, alone = case.outputs(), case.alone(row)
    calls = outputs.recorded(case.model, case.names, alone)
    each = [(head, draws) for head, call in enumerate(calls) for draws in _draws(call.parts[0].law, call.parts)]
    total = torch.zeros(1)
    for combination in itertools.product(*(draws for _, draws in each)):
        streams = [
            torch.tensor([draw for (head, _), (_, draw) in zip(each, combination, strict=True) if head == number])
            for number in range(len(calls))
        ]
        monkeypatch.setattr(
            random_numbers, "integers_at", lambda seed, stream, at, streams=streams: streams[stream & 0xFFFF][at]
        )
        (gradient,) = case.gradients(outputs.seeded(0, 0), alone)
        total = total + math.prod(chance for chance, _ in combination) * gradient.outer(gradient)
    return total


def _draws(law: Law, parts: Any) -> list[list[tuple[float, int]]]:
    draws = possible(law, parts[0].outputs)
    if len(parts) > 1 or isinstance(law, output_laws.Categorical):
        return draws
    return [[(0.5, signed(bit << 63)) for bit in range(2)]] * len(draws)  # the second bit is not read


CLASSES = torch.tensor([2, 0, 1])
TOKENS = torch.tensor([[0, 2], [1, -100], [2, 1]])
VALUES = torch.tensor([0.5, -1.0, 2.0]).double()
PAIRS = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]).double()
COUNTS = torch.tensor([[0.0, 3.0], [1.0, 2.0], [5.0, 0.0]]).double()
SOFT = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]]).double()
WEIGHTS = torch.tensor([0.5, 2.0, 3.0]).double()
THREE, TWO = (3,), (2,)


def one_by_one(f: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(own[None], label[None]) for own, label in zip(f, y, strict=True)])


def token_mean(f: Tensor, y: Tensor) -> Tensor:
    """f: [batch, tokens, classes]"""
    losses = F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    return losses.sum(1) / (y != -100).sum(1)


def each_token_mean(f: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(own, label, weight=WEIGHTS) for own, label in zip(f, y, strict=True)])


def two_heads(f: Tensor, y: Tensor) -> Tensor:
    """A class from three outputs, and a value."""
    classes = F.cross_entropy(f[:, :3], y, reduction="none")
    return classes + 0.3 * F.mse_loss(f[:, 3], y.double(), reduction="none")


CASES: dict[str, tuple[tuple[int, ...], Tensor, Function]] = {
    "cross_entropy": (THREE, CLASSES, lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "the module": (THREE, CLASSES, lambda f, y: nn.CrossEntropyLoss(reduction="none")(f, y)),
    "half of it": (THREE, CLASSES, lambda f, y: 0.5 * F.cross_entropy(f, y, reduction="none")),
    "class weights": (THREE, CLASSES, lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS, reduction="none")),
    "label smoothing": (THREE, CLASSES, lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2, reduction="none")),
    "smoothing and weights": (
        THREE,
        CLASSES,
        lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS, label_smoothing=0.2, reduction="none"),
    ),
    "soft targets": (THREE, SOFT, lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS, reduction="none")),
    "soft targets, smoothed": (THREE, SOFT, lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3, reduction="none")),
    "tokens": ((3, 2), TOKENS, lambda f, y: F.cross_entropy(f, y, reduction="none").sum(1)),
    "mean of tokens": ((2, 3), TOKENS, token_mean),
    "each example's mean": ((2, 3), TOKENS, each_token_mean),
    "old reduce": (THREE, CLASSES, lambda f, y: nn.CrossEntropyLoss(reduce=False)(f, y)),
    "examples one by one": (THREE, CLASSES, one_by_one),
    "nll_loss": (THREE, CLASSES, lambda f, y: F.nll_loss(f.log_softmax(1), y, weight=WEIGHTS, reduction="none")),
    "nll_loss, pixels": (
        (3, 2, 1),
        TOKENS[:, :, None],
        lambda f, y: F.nll_loss(F.log_softmax(f, 1), y, reduction="none").sum((1, 2)),
    ),
    "gather": (THREE, CLASSES, lambda f, y: -f.log_softmax(1).gather(1, y[:, None])[:, 0]),
    "gather, tokens": (
        (2, 3),
        TOKENS,
        lambda f, y: -(torch.log_softmax(f, 2).gather(2, y.clamp_min(0)[..., None])[..., 0] * (y >= 0)).sum(1),
    ),
    "gather, logsumexp": (
        THREE,
        CLASSES,
        lambda f, y: -torch.gather(f - f.logsumexp(1, keepdim=True), 1, y[:, None])[:, 0],
    ),
    "take_along_dim": (THREE, CLASSES, lambda f, y: -torch.take_along_dim(f.log_softmax(1), y[:, None], 1)[:, 0]),
    "[rows, labels]": (THREE, CLASSES, lambda f, y: -F.log_softmax(f, 1)[torch.arange(len(y)), y]),
    "distribution": (THREE, CLASSES, lambda f, y: -torch.distributions.Categorical(logits=f).log_prob(y)),
    "kl_div": (THREE, SOFT, lambda f, y: F.kl_div(f.log_softmax(1), y, reduction="none").sum(1)),
    "kl_div, one by one": (
        THREE,
        SOFT.clamp_min(1e-3).log(),
        lambda f, y: torch.stack(
            [
                F.kl_div(own.log_softmax(0)[None], target[None], reduction="batchmean", log_target=True)
                for own, target in zip(f, y, strict=True)
            ]
        ),
    ),
    "binary_cross_entropy_with_logits": (
        (),
        PAIRS[:, 0],
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none"),
    ),
    "several binary labels": (
        TWO,
        PAIRS,
        lambda f, y: F.binary_cross_entropy_with_logits(
            f, y, weight=WEIGHTS[:2], pos_weight=WEIGHTS[1:], reduction="none"
        ).mean(1),
    ),
    "binary_cross_entropy": (TWO, PAIRS, lambda f, y: F.binary_cross_entropy(f.sigmoid(), y, reduction="none").sum(1)),
    "mse_loss": (TWO, PAIRS, lambda f, y: F.mse_loss(f, y, reduction="none").mean(1)),
    "mse_loss, arguments exchanged": ((), VALUES, lambda f, y: F.mse_loss(y, f, reduction="none")),
    "mse_loss, one by one": (
        TWO,
        PAIRS,
        lambda f, y: torch.stack([F.mse_loss(*one) for one in zip(f, y, strict=True)]),
    ),
    "difference of outputs": (TWO, VALUES, lambda f, y: F.mse_loss(f[:, 0], f[:, 1], reduction="none")),
    "squares": ((), VALUES, lambda f, y: 3 * (f - y) ** 2),
    "half squares": ((), VALUES, lambda f, y: (f - y).square() / 2),
    "poisson_nll_loss": (TWO, COUNTS, lambda f, y: F.poisson_nll_loss(f, y, reduction="none").sum(1)),
    "poisson_nll_loss, rate": (
        (),
        COUNTS[:, 1],
        lambda f, y: F.poisson_nll_loss(f.exp(), y, log_input=False, eps=1e-12, reduction="none"),
    ),
    "two heads": ((4,), CLASSES, two_heads),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", CASES)
def test_the_square_of_the_gradient_is_the_gauss_newton_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mean over all draws, for each of the examples."""
    case = Case(*CASES[name])
    for row in range(3):
        torch.testing.assert_close(
            expected_square(case, row, monkeypatch).float(), case.gauss_newton(row).float(), rtol=1e-4, atol=1e-7
        )


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", CASES)
def test_draws_are_the_same_for_an_example_alone(name: str) -> None:
    """In the batch, alone by autograd, and by vmap; of another seed they differ."""
    case = Case(*CASES[name])
    outputs = case.outputs()
    measure = outputs.seeded(7, 2)
    together = case.gradients(measure, case.batch)
    alone = [case.gradients(measure.at(torch.tensor([row])), case.alone(row)) for row in range(3)]
    torch.testing.assert_close(torch.cat(alone), together)
    if "one by one" not in name and "each" not in name:  # loops over examples that vmap cannot follow
        mapped = vmapped_gradients(case.model, measure, case.batch, case.names)
        torch.testing.assert_close(torch.cat([mapped[own].flatten(1) for own in case.names], 1), together)
    others = torch.stack([case.gradients(outputs.seeded(seed, 2), case.batch) for seed in range(8, 16)])
    assert not all(torch.equal(other, together) for other in others)


def test_several_calls_and_one_by_one_are_told_apart() -> None:
    heads, loop, tokens = (Case(*CASES[name]).outputs() for name in ("two heads", "examples one by one", "tokens"))
    assert (heads.calls, heads.example_by_example, heads.law) == (2, False, None)
    assert (loop.calls, loop.example_by_example) == (1, True)
    assert loop.law is not None
    assert tokens.law is None
    assert heads.functions == ["categorical over 3 classes (cross_entropy)", "Gaussian (mse_loss)"]


@pytest.mark.parametrize(
    "name", ["cross_entropy", "class weights", "label smoothing", "nll_loss", "examples one by one"]
)
def test_classes_are_given_instead_of_drawn(name: str) -> None:
    """By their probability they sum to the Gauss-Newton matrix, in the batch and alone."""
    case = Case(*CASES[name])
    outputs = case.outputs()
    chances = case.model(case.inputs).softmax(1)
    total = torch.zeros(1)
    for label in range(3):
        measure = outputs.seeded(0, 0, torch.full((3,), label))
        gradients = case.gradients(measure, case.batch)
        for row in range(3):
            alone = case.gradients(measure.at(torch.tensor([row])), case.alone(row))
            torch.testing.assert_close(alone[0], gradients[row])
        total = total + chances[:, label, None, None] * gradients[:, :, None] * gradients[:, None]
    for row in range(3):
        torch.testing.assert_close(total[row], case.gauss_newton(row))


def test_a_gaussian_with_its_variance_has_the_information_of_both() -> None:
    """1 / v of the mean, 1 / (2 v^2) of the variance, and nothing between them."""
    case = Case(TWO, VALUES, lambda f, y: F.gaussian_nll_loss(f[:, 0], y, f[:, 1].exp(), reduction="none"))
    outputs = case.outputs()
    (call,) = outputs.recorded(case.model, case.names, case.batch)
    variance = case.model(case.inputs)[:, 1].exp()
    squares = torch.zeros(3, 2, 2).double()
    for bits in range(4):
        draws = Draws(torch.full((3,), signed(bits << 62)))
        roots = torch.stack([part.law.roots(part.outputs, draws) for part in call.parts], dim=1)
        squares += roots[:, :, None] * roots[:, None] / 4
    torch.testing.assert_close(squares, torch.diag_embed(torch.stack([1 / variance, 0.5 / variance**2], dim=1)))
    together = case.gradients(outputs.seeded(0, 0), case.batch)
    torch.testing.assert_close(together[1:2], case.gradients(outputs.seeded(0, 0).at(torch.tensor([1])), case.alone(1)))


@pytest.mark.parametrize(
    ("law", "loss"),
    [
        (output_laws.LAPLACE, lambda e: F.l1_loss(e, torch.zeros_like(e), reduction="none")),
        (output_laws.huber(0.7), lambda e: F.huber_loss(e, torch.zeros_like(e), delta=0.7, reduction="none")),
        (output_laws.huber(3.0), lambda e: F.huber_loss(e, torch.zeros_like(e), delta=3.0, reduction="none")),
        (output_laws.smooth_l1(0.4), lambda e: F.smooth_l1_loss(e, torch.zeros_like(e), beta=0.4, reduction="none")),
        (output_laws.smooth_l1(0.0), lambda e: F.l1_loss(e, torch.zeros_like(e), reduction="none")),
    ],
)
def test_fisher_information_of_a_location(law: Law, loss: Callable[[Tensor], Tensor]) -> None:
    """The mean square of the slope under the density exp(-loss), by numerical integration."""
    errors = torch.linspace(-40, 40, 800_001, dtype=torch.float64, requires_grad=True)
    values = loss(errors)
    (slopes,) = torch.autograd.grad(values.sum(), errors)
    density = (-values).exp().detach()
    expected = float((density * slopes.square()).sum() / density.sum())
    root = law.roots(torch.zeros(1).double(), Draws(torch.zeros(1, dtype=torch.int64)))
    assert float(root.square()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("function", [F.l1_loss, F.huber_loss, F.smooth_l1_loss])
def test_locations_are_recognised(function: Any) -> None:
    case = Case(TWO, PAIRS, lambda f, y: function(f, y, reduction="none").mean(1))
    gradient = case.gradients(case.outputs().seeded(0, 0), case.batch)
    assert (gradient != 0).any(1).all()


def focal(f: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(f, y, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


def focal_by_probabilities(f: Tensor, y: Tensor) -> Tensor:
    chances = f.softmax(1).gather(1, y[:, None])[:, 0]
    return (1 - chances) ** 2 * F.cross_entropy(f, y, reduction="none")


def learned_variance(f: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(f[:, 0], y.double(), reduction="none") / f[:, 1].exp() + f[:, 1]


def with_metric(f: Tensor, y: Tensor) -> Tensor:
    """What a loss function returns is not used."""
    F.cross_entropy(f, y)
    return f.logsumexp(1) - f[:, 0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (focal, "not a weighted sum"),
        (focal_by_probabilities, "depends on the model"),
        (learned_variance, "depends on the model"),
        (lambda f, y: F.mse_loss(f, f.detach() + 1, reduction="none").mean(1).sqrt(), "not a weighted sum"),
        (lambda f, y: f.logsumexp(1) - f[:, 0], "none of the loss functions"),
        (lambda f, y: F.nll_loss(f, y, reduction="none"), "none of the loss functions"),  # no log-probabilities
        (lambda f, y: -f.gather(1, y[:, None])[:, 0], "none of the loss functions"),
        (with_metric, "none of the loss functions"),
    ],
)
def test_what_has_no_known_law_is_not_recognised(function: Function, reason: str) -> None:
    found = Case(THREE, CLASSES, function).examined()
    assert isinstance(found, str)
    assert reason in found


def test_other_terms_are_left_out() -> None:
    """Their gradient is not part of the square."""
    plain = Case(*CASES["cross_entropy"])
    case = Case(
        THREE, CLASSES, lambda f, y: F.cross_entropy(f, y, reduction="none") + 0.1 * f.exp().sum(1) + f.sin().sum(1)
    )
    outputs = case.outputs()
    assert outputs.has_other_terms
    assert not plain.outputs().has_other_terms
    torch.testing.assert_close(
        case.gradients(outputs.seeded(4, 0), case.batch), plain.gradients(plain.outputs().seeded(4, 0), plain.batch)
    )


def test_squares_within_the_model_are_not_errors() -> None:
    """A normalisation by mean squares, and squared errors of its outputs."""

    class Normalized(Network):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.hidden(x)
            return self.last(hidden / (hidden.pow(2).mean(1, keepdim=True) + 1).sqrt()).reshape(len(x), *self.shape)

    case = Case((), VALUES, lambda f, y: (f - y) ** 2)
    case.model = Normalized().double().eval().requires_grad_(False)
    assert case.outputs().functions == ["Gaussian (squares)"]
    assert not case.outputs().has_other_terms


def test_nothing_of_the_model_is_left_changed() -> None:
    case = Case((), VALUES, lambda f, y: (f - y) ** 2)
    case.gradients(case.outputs().seeded(0, 0), case.batch)
    assert not any(parameter.requires_grad for parameter in case.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
