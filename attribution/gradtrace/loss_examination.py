"""Examine a task's loss: whose outputs does it take, and do the laws of its loss functions hold for it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradtrace.gradients import Measure
from gradtrace.loss_calls import LossCall
from gradtrace.loss_outputs import RecordedLoss, Scaled, SeededLoss, differentiable
from gradtrace.output_laws import Categorical, Law
from gradtrace.task import Batch

_ROUNDING = 2e-3  # of losses, relative to the largest, that are to be linear in those of their elements


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """What the loss functions that a loss calls take from the model.

    loss, handwritten, calls, in_turn, beside: as of `SeededLoss`.
    functions: each law's name with the function's, "categorical over 10 classes (cross_entropy)".
    law: that of the one label that each example has; None where examples have several.
    targets: of the examined batch, [batch], where `law` is one and they are known.
    """

    loss: Measure
    handwritten: bool
    calls: int
    in_turn: bool
    beside: bool
    functions: Sequence[str]
    law: Law | None
    classes: int | None
    targets: Tensor | None

    def seeded(self, seed: int, stream: int, classes: Tensor | None = None) -> SeededLoss:
        return SeededLoss(self.loss, self.handwritten, self.calls, self.in_turn, self.beside, seed, stream, classes)

    def recorded(self, model: nn.Module, names: Sequence[str], batch: Batch) -> list[LossCall]:
        """The calls on a batch. names: of the parameters that are trained."""
        recording = self.recording()
        with differentiable(model, names):
            recording(model, batch)
        return recording.calls or []

    def recording(self) -> RecordedLoss:
        return RecordedLoss(self.loss, self.handwritten)


class _NoLawError(Exception):
    """The loss is no sum of losses with a known law; the text says why not."""


@dataclass(frozen=True, eq=False)
class _Examined:
    """A loss with its calls cut off from the model.  losses: [batch], with the graph of what else they depend on"""

    calls: Sequence[LossCall]
    leaves: Sequence[Tensor]
    losses: Tensor


def examined_outputs(
    loss: Measure, model: nn.Module, names: Sequence[str], batch: Batch, alone: Callable[[], Batch]
) -> LossOutputs | str:
    """What the loss takes from the model, from a few examples; or why that is not known.

    Args:
        names: of the parameters that are trained.
        alone: collates the first of the examples alone.
    """
    reason = ""
    for handwritten in (True, False):
        try:
            return _outputs(loss, model, names, batch, alone, handwritten)
        except _NoLawError as error:
            reason = str(error)
    return reason


def _outputs(
    loss: Measure,
    model: nn.Module,
    names: Sequence[str],
    batch: Batch,
    alone: Callable[[], Batch],
    handwritten: bool,
) -> LossOutputs:
    def examined(factor: float, examples: Batch = batch) -> _Examined:
        with Scaled(model, handwritten, factor) as scaled:
            losses = loss(model, examples)
        return _Examined(scaled.calls, scaled.leaves, losses)

    with differentiable(model, names) as parameters:
        plain = examined(1.0)
        weights = _weights(plain)
        if not any(weights):
            raise _NoLawError("it is made from none of the loss functions of torch.nn.functional")
        _check_linear(plain.losses, examined(2.0).losses, examined(0.5).losses)
        beside = _has_other_terms(plain, lambda: examined(2.0), parameters)
        count = len(plain.losses)
        calls = len(plain.calls) if len(plain.calls) == 1 else len(examined(1.0, alone()).calls)
    in_turn = len(plain.calls) == calls * count > calls
    regular = in_turn or len(plain.calls) == calls
    single = _single_law(plain, weights) if regular else None
    used = [call for call, weight in zip(plain.calls, weights, strict=True) if weight is not None]
    return LossOutputs(
        loss,
        handwritten,
        calls if regular else len(plain.calls),
        in_turn,
        beside,
        list(dict.fromkeys(_named(call) for call in used)),
        single,
        _classes(plain.calls[0]) if isinstance(single, Categorical) else None,
        _targets(used) if single else None,
    )


def _check_linear(plain: Tensor, doubled: Tensor, halved: Tensor) -> None:
    """Losses must be linear in those of the elements; other terms beside them may be constant."""
    with torch.no_grad():
        bend = (doubled - plain) - 2 * (plain - halved)
        largest = float(torch.stack([plain.abs().max(), doubled.abs().max()]).max())
        if not float(bend.abs().max()) <= _ROUNDING * largest:  # or NaN
            raise _NoLawError("it is not a weighted sum of what the loss functions return (a focal loss, say, is not)")


def _has_other_terms(plain: _Examined, doubled: Callable[[], _Examined], parameters: Sequence[Tensor]) -> bool:
    """Whether losses depend on the model also beside their calls; in a product with these, there is no law."""
    others = _gradient(plain.losses, parameters)
    if others is None:
        return False
    change = _gradient(doubled().losses, parameters)
    if change is None or float((change - others).norm()) > _ROUNDING * float(others.norm()):
        raise _NoLawError("it weighs what the loss functions return by what depends on the model (a focal loss, say)")
    return True


def _gradient(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Of their sum, flat; None where it is zero."""
    if not losses.requires_grad:
        return None
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    there = [own for own in gradients if own is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in there]) if there else None
    return (
        None
        if flat is None or not bool(flat.any())
        else torch.cat(
            [
                (torch.zeros_like(parameter) if own is None else own).flatten().float()
                for parameter, own in zip(parameters, gradients, strict=True)
            ]
        )
    )


def _weights(plain: _Examined) -> list[tuple[Tensor, Tensor] | None]:
    """By call, d losses.sum() / d elements, and the same with example i counted 1 + i times; None for calls that the
    losses do not depend on."""
    if not (plain.leaves and plain.losses.requires_grad):
        return [None] * len(plain.calls)
    factors = torch.arange(1, len(plain.losses) + 1, device=plain.losses.device).to(plain.losses.dtype)
    sums = (plain.losses.sum(), (factors * plain.losses).sum())
    leaves = plain.leaves
    equal, counted = (torch.autograd.grad(own, leaves, retain_graph=True, allow_unused=True) for own in sums)
    return [None if one is None or other is None else (one, other) for one, other in zip(equal, counted, strict=True)]


def _single_law(plain: _Examined, weights: Sequence[tuple[Tensor, Tensor] | None]) -> Law | None:
    """The law of the label of every example, where each has one, in the batch's order."""
    used = [(call, weight) for call, weight in zip(plain.calls, weights, strict=True) if weight is not None]
    if len(used) < len(plain.calls) or sum(call.distributions for call, _ in used) != len(plain.losses):
        return None
    if len({_named(call) for call, _ in used}) > 1 or any(len(call.parts) > 1 for call, _ in used):
        return None
    equal = torch.cat([_by_label(call, pair[0]) for call, pair in used])
    counted = torch.cat([_by_label(call, pair[1]) for call, pair in used])
    factors = torch.arange(1, len(equal) + 1, device=equal.device)
    return used[0][0].parts[0].law if torch.allclose(counted, factors * equal, rtol=1e-3) else None


def _by_label(call: LossCall, weights: Tensor) -> Tensor:
    """[labels]; of the elements of one label, which kl_div has, their sum."""
    return weights.flatten() if weights.numel() == call.distributions else weights.sum(_dim(call)).flatten()


def _dim(call: LossCall) -> int:
    law = call.parts[0].law
    assert isinstance(law, Categorical)  # other elements have one label each
    return law.dim


def _classes(call: LossCall) -> int:
    return call.parts[0].outputs.shape[_dim(call)]


def _named(call: LossCall) -> str:
    law = call.parts[0].law
    over = f" over {_classes(call)} classes" if isinstance(law, Categorical) else ""
    return f"{law.name}{over} ({call.function})"


def _targets(calls: Sequence[LossCall]) -> Tensor | None:
    targets = [call.parts[0].targets for call in calls]
    known = [own.detach().double().cpu() for own in targets if own is not None]
    return torch.cat(known) if len(known) == len(targets) else None
