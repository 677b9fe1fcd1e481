"""Watch the loss functions that a task's loss calls, and put other gradients in the place of theirs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradtrace import random_numbers
from gradtrace.data.batches import Measure
from gradtrace.labels.laws import Categorical, Draws
from gradtrace.labels.loss_calls import LossCall, LossPart, read_call
from gradtrace.task import Batch

AnyCalls = TypeVar("AnyCalls", bound="LossCalls")


class LossCalls(TorchFunctionMode):
    """While open, `result` stands for what each call of a loss function returns.

    handwritten: squares and absolute values count as such calls, outside of the forward passes of the model's modules.
    """

    def __init__(self, model: nn.Module, handwritten: bool) -> None:
        super().__init__()
        self._model, self._handwritten, self._depth = model, handwritten, 0
        self._hooks = ExitStack()

    def __enter__(self: AnyCalls) -> AnyCalls:
        if self._handwritten:
            for module in self._model.modules():
                self._hooks.callback(module.register_forward_pre_hook(partial(self._count, 1)).remove)
                leave = module.register_forward_hook(partial(self._count, -1), always_call=True)
                self._hooks.callback(leave.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _count(self, change: int, *call: Any) -> None:
        self._depth += change

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            call = read_call(func, args, kwargs, self._handwritten and not self._depth)
            if call is not None:
                return self.result(call, partial(func, *args, **kwargs))
        return func(*args, **kwargs)

    @abstractmethod
    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        """What the call returns. compute: the call itself."""


class Recorder(LossCalls):
    """Keeps the calls, which return what they would."""

    def __init__(self, model: nn.Module, handwritten: bool) -> None:
        super().__init__(model, handwritten)
        self.calls: list[LossCall] = []

    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        self.calls.append(replace(call, parts=[replace(own, outputs=own.outputs.detach()) for own in call.parts]))
        return compute()


class RecordedLoss:
    """A task's loss that keeps the calls of its first evaluation, the only one where a batch goes through at once."""

    def __init__(self, loss: Measure, handwritten: bool) -> None:
        self._loss, self._handwritten = loss, handwritten
        self.calls: list[LossCall] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.calls is not None:
            return self._loss(model, batch)
        with Recorder(model, self._handwritten) as recorder:
            losses = self._loss(model, batch)
        self.calls = recorder.calls
        return losses


class Scaled(LossCalls):
    """The elements' losses times a factor, cut off from the model.  leaves: these losses, in order, for gradients"""

    def __init__(self, model: nn.Module, handwritten: bool, factor: float) -> None:
        super().__init__(model, handwritten)
        self._factor = factor
        self.calls: list[LossCall] = []
        self.leaves: list[Tensor] = []

    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        self.calls.append(call)
        self.leaves.append((call.elements * self._factor).requires_grad_())
        return call.returned(self.leaves[-1])


@dataclass(frozen=True, eq=False)
class SeededLoss:
    """The task's loss, whose gradient g is that of a draw: E[g gT] is the Gauss-Newton matrix of each example's loss.

    An element's loss with weight w in the example's counts with w times its Fisher information, see `output_laws`. The
    values are those of the loss; only its gradient is another.

    calls: of loss functions for one example alone.
    in_turn: a batch makes them for one example after the other, not for all examples together.
    beside: the loss has other terms, whose gradient is left out.
    seed, stream: of the draws.
    classes: int64 [batch], the class that each example is given instead of a drawn one.
    positions: int64 [n], which examples of the batch the given ones are; None: all, in order.
    degree: the gradient grows with this power of the example's weight in a sum of losses.
    """

    loss: Measure
    handwritten: bool
    calls: int
    in_turn: bool
    beside: bool
    seed: int
    stream: int
    classes: Tensor | None = None
    positions: Tensor | None = None
    degree = 0.5

    def at(self, positions: Tensor) -> SeededLoss:
        """The same draws, for some of the batch's examples in a batch of their own. positions: int64 [n]"""
        return replace(self, positions=positions)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with _Seeding(model, self):
            losses = self.loss(model, batch)
        if self.beside:
            with Scaled(model, self.handwritten, 1.0):
                others = self.loss(model, batch)
            losses = losses - others + others.detach()
        return losses


class _Seeding(LossCalls):
    def __init__(self, model: nn.Module, seeded: SeededLoss) -> None:
        super().__init__(model, seeded.handwritten)
        self._seeded, self._calls = seeded, 0

    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        number, elements = self._calls, call.elements
        self._calls += 1
        draws = self._draws(number, call.distributions, elements.device)
        for part in call.parts:
            elements = _seeded_part(part, elements, draws)
        return call.returned(elements)

    def _draws(self, number: int, count: int, device: torch.device) -> Draws:
        """Of the call of this number, with so many elements."""
        seeded = self._seeded
        head, example = number % seeded.calls, number // seeded.calls if seeded.in_turn else 0
        positions, classes = seeded.positions, seeded.classes
        if positions is not None:
            classes = None if classes is None else classes.index_select(0, positions)
            each = count // len(positions)
            numbers = (positions[:, None] * each + torch.arange(each, device=device)).flatten()
        else:
            classes = classes[example : example + 1] if classes is not None and seeded.in_turn else classes
            numbers = torch.arange(example * count, (example + 1) * count, device=device)
        stream = (seeded.stream << 16) + head
        return Draws(random_numbers.integers_at(seeded.seed, stream, numbers), classes)


def _seeded_part(part: LossPart, elements: Tensor, draws: Draws) -> Tensor:
    """The elements' losses, with the gradient of a draw at the part's outputs beside what gradient they have."""
    with torch.no_grad():
        outputs = part.outputs.detach()
        precise = outputs if outputs.dtype == torch.float64 else outputs.float()
        roots = part.law.roots(precise, draws)
    dim = part.law.dim if isinstance(part.law, Categorical) else None
    nothing = torch.zeros_like(elements)
    seeded: Tensor = _Seeded.apply(part.outputs, nothing, part.mass, roots, dim)  # type: ignore[no-untyped-call]
    return elements + seeded


class _Seeded(torch.autograd.Function):
    """Values that carry sqrt(|gradient| x mass) x roots back to the outputs. See `SeededLoss`."""

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


@contextmanager
def differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """While open, these parameters require a gradient, so that the model's outputs do."""
    parameters = [model.get_parameter(name) for name in names]
    try:
        with torch.enable_grad():
            yield [parameter.requires_grad_(True) for parameter in parameters]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
