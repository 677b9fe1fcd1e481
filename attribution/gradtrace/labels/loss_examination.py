"""Examine a task's loss: whose outputs does it take, and do the laws of its loss functions hold for it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradtrace.data.batches import Measure
from gradtrace.labels.laws import Categorical, Law
from gradtrace.labels.loss_calls import LossCall
from gradtrace.labels.loss_outputs import RecordedLoss, Scaled, SeededLoss, differentiable
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


_NONE = "it is made from none of the loss functions of torch.nn.functional"


class _NoLawError(Exception):
    """The loss is no sum of losses with a known law; the text says why not."""


@dataclass(frozen=True, eq=False)
class _Examined:
    """A loss with its calls cut off from the model.

    losses: [batch], with the graph of what else they depend on
    """

    calls: Sequence[LossCall]
    leaves: Sequence[Tensor]
    losses: Tensor


@dataclass(frozen=True, eq=False)
class Probe:
    """A few examples, and how to evaluate a loss on them.

    names: of the parameters that are trained.
    alone: collates the first of the examples alone.
    """

    loss: Measure
    model: nn.Module
    names: Sequence[str]
    batch: Batch
    alone: Callable[[], Batch]

    def examined(self, handwritten: bool, factor: float = 1.0, batch: Batch = None) -> _Examined:
        """With the elements' losses times a factor. batch: another one than all examples"""
        with Scaled(self.model, handwritten, factor) as scaled:
            losses = self.loss(self.model, self.batch if batch is None else batch)
        return _Examined(scaled.calls, scaled.leaves, losses)


def examined_outputs(probe: Probe) -> LossOutputs | str:
    """What the loss takes from the model; or why that is not known.

    Squares and absolute values count as errors only where that tells more: where the loss calls no loss function, or
    has terms beside these.
    """
    plain = _outputs_or_reason(probe, False)
    if isinstance(plain, LossOutputs) and (plain.law is not None or not plain.beside):
        return plain
    by_hand = _outputs_or_reason(probe, True)
    return by_hand if isinstance(by_hand, LossOutputs) or plain == _NONE else plain


def _outputs_or_reason(probe: Probe, handwritten: bool) -> LossOutputs | str:
    try:
        return _outputs(probe, handwritten)
    except _NoLawError as error:
        return str(error)
    except Exception as error:  # of code that takes watched or scaled losses otherwise than plain ones
        return f"it fails while it is watched, {type(error).__name__}: {error}"


def _outputs(probe: Probe, handwritten: bool) -> LossOutputs:
    with differentiable(probe.model, probe.names) as parameters:
        plain = probe.examined(handwritten)
        weights = _weights(plain)
        if not any(weights):
            raise _NoLawError(_NONE)
        doubled = probe.examined(handwritten, 2.0)
        _check_linear(plain.losses, doubled.losses, probe.examined(handwritten, 0.5).losses)
        beside = _has_other_terms(plain, doubled, parameters)
        made = len(plain.calls)
        calls = made if made == 1 else len(probe.examined(handwritten, batch=probe.alone()).calls)
    in_turn = made == calls * len(plain.losses) > calls
    single = _single_law(plain, weights) if in_turn or made == calls else None
    used = [call for call, weight in zip(plain.calls, weights, strict=True) if weight is not None]
    return LossOutputs(
        loss=probe.loss,
        handwritten=handwritten,
        calls=calls if in_turn else made,
        in_turn=in_turn,
        beside=beside,
        functions=list(dict.fromkeys(_named(call) for call in used)),
        law=single,
        classes=_classes(plain.calls[0]) if isinstance(single, Categorical) else None,
        targets=_targets(used) if single else None,
    )


def _check_linear(plain: Tensor, doubled: Tensor, halved: Tensor) -> None:
    """Losses must be linear in those of the elements; other terms beside them may be constant."""
    with torch.no_grad():
        bend = (doubled - plain) - 2 * (plain - halved)
        largest = float(torch.stack([plain.abs().max(), doubled.abs().max()]).max())
        if not float(bend.abs().max()) <= _ROUNDING * largest:  # or NaN
            raise _NoLawError("it is not a weighted sum of what the loss functions return (a focal loss, say, is not)")


def _has_other_terms(plain: _Examined, doubled: _Examined, parameters: Sequence[Tensor]) -> bool:
    """Whether losses depend on the model also beside their calls; in a product with these, there is no law."""
    others = _gradient(plain.losses, parameters)
    if others is None:
        return False
    change = _gradient(doubled.losses, parameters)
    if change is None or float((change - others).norm()) > _ROUNDING * float(others.norm()):
        raise _NoLawError("it weighs what the loss functions return by what depends on the model (a focal loss, say)")
    return True


def _gradient(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Of their sum, flat; None where it is zero."""
    if not losses.requires_grad:
        return None
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    if not any(own is not None and bool(own.any()) for own in gradients):
        return None
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(values) if own is None else own).flatten().float() for own, values in pairs])


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
