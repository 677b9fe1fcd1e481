"""A task's loss with the gradients of sampled labels in place of its own, for the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace import random_numbers
from gradtrace.data.batches import Measure
from gradtrace.labels.call_readers import LossCall, LossPart
from gradtrace.labels.interception import CallInterceptor, RecordedLoss, differentiable
from gradtrace.labels.laws import Categorical, Draws, Law
from gradtrace.task import Batch


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """The outputs that a task's loss passes to loss functions, and the laws of their labels.

    handwritten: squares and absolute values count as loss functions, see `CallInterceptor`
    calls: number of calls of loss functions for one example
    example_by_example: a batch makes these calls for one example after the other, instead of for all of them at once
    has_other_terms: the loss has terms that come from no such call
    functions: each law's name with that of its function: "categorical over 10 classes (cross_entropy)"
    law: of the label, if each example has exactly one; else None
    classes: their number, if `law` is categorical
    targets: labels of the analysed batch, [batch], if `law` is not None and they are known
    """

    loss: Measure
    handwritten: bool
    calls: int
    example_by_example: bool
    has_other_terms: bool
    functions: Sequence[str]
    law: Law | None
    classes: int | None
    targets: Tensor | None

    def seeded(self, seed: int, stream: int, classes: Tensor | None = None) -> SeededLoss:
        """The loss with the gradients of drawn labels. classes: int64 [batch], used instead of drawn ones"""
        return SeededLoss(self, seed, stream, classes)

    def recorded(self, model: nn.Module, names: Sequence[str], batch: Batch) -> list[LossCall]:
        """The calls of loss functions on a batch. names: of the trained parameters"""
        recording = self.recording()
        with differentiable(model, names):
            recording(model, batch)
        return recording.calls or []

    def recording(self) -> RecordedLoss:
        return RecordedLoss(self.loss, self.handwritten)


@dataclass(frozen=True, eq=False)
class SeededLoss:
    """The task's loss, with its values, but the gradient g of a draw: E[g gT] is the Gauss-Newton matrix of the loss.

    The gradient at the outputs of an element of weight w in the example's loss is sqrt(w mass) s, with s from
    `laws.Law.roots`. The signs or classes of different elements are independent, so that mixed terms vanish in E[g gT].

    Terms of the loss that come from no loss function have no gradient.

    seed, stream: of the draws
    classes: int64 [batch], the class of each example to use instead of a drawn one
    positions: int64 [n], positions in the batch of the examples that the loss is called with; None: all, in order
    degree: the gradient grows with this power of the example's weight in a sum of losses
    """

    outputs: LossOutputs
    seed: int
    stream: int
    classes: Tensor | None = None
    positions: Tensor | None = None
    degree = 0.5

    def at(self, positions: Tensor) -> SeededLoss:
        """The same draws, for a batch that holds only the examples at `positions`, int64 [n]."""
        return replace(self, positions=positions)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs, numbers = self.outputs, count()

        def with_draws(call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
            elements = call.elements
            draws = self._draws(next(numbers), call.labels, elements.device)
            for part in call.parts:
                elements = _add_draw(part, elements, draws)
            return call.reduce(elements)

        with CallInterceptor(model, outputs.handwritten, with_draws):
            losses = outputs.loss(model, batch)
        if outputs.has_other_terms:
            with CallInterceptor(model, outputs.handwritten, lambda call, compute: call.reduce(call.elements)):
                other_terms = outputs.loss(model, batch)  # the gradient is that of the other terms alone
            losses = losses - other_terms + other_terms.detach()
        return losses

    def _draws(self, number: int, count: int, device: torch.device) -> Draws:
        """Draws for the `count` labels of the call of this number."""
        outputs, positions, classes = self.outputs, self.positions, self.classes
        head, example = number % outputs.calls, number // outputs.calls if outputs.example_by_example else 0
        if positions is not None:
            classes = None if classes is None else classes.index_select(0, positions)
            per_example = count // len(positions)
            numbers = (positions[:, None] * per_example + torch.arange(per_example, device=device)).flatten()
        else:
            classes = classes[example : example + 1] if classes is not None and outputs.example_by_example else classes
            numbers = torch.arange(example * count, (example + 1) * count, device=device)
        stream = (self.stream << 16) + head
        return Draws(random_numbers.integers_at(self.seed, stream, numbers), classes)


def _add_draw(part: LossPart, elements: Tensor, draws: Draws) -> Tensor:
    """The elements' losses, unchanged in value, with the gradient of a draw at the part's outputs added to theirs."""
    with torch.no_grad():
        outputs = part.outputs.detach()
        roots = part.law.roots(outputs if outputs.dtype == torch.float64 else outputs.float(), draws)
    dim = part.law.dim if isinstance(part.law, Categorical) else None
    zeros = torch.zeros_like(elements)
    with_gradient: Tensor = _DrawGradient.apply(part.outputs, zeros, part.mass, roots, dim)  # type: ignore[no-untyped-call]
    return elements + with_gradient


class _DrawGradient(torch.autograd.Function):
    """Returns `values`; its backward pass gives `outputs` the gradient sqrt(|gradient| x mass) x roots."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, values: Tensor, mass: Tensor, roots: Tensor, dim: int | None) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int | None], output: Tensor) -> None:
        outputs, _, mass, roots, dim = inputs
        ctx.save_for_backward(mass, roots)
        ctx.dim, ctx.dtype = dim, outputs.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        mass, roots = ctx.saved_tensors
        weights = grads[0].abs().to(roots.dtype) * mass
        if ctx.dim is not None:
            weights = weights.sum(ctx.dim, keepdim=True)
        return (weights.sqrt() * roots).to(ctx.dtype), None, None, None, None
